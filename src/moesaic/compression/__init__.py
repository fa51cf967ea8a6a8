"""Making a model smaller for every token alike."""
