"""The rows of the catalog, one file per part of the house."""
