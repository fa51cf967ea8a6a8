"""Removing parts of a model for good."""
