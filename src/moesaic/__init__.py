"""moesaic: turn a dense language model into a mosaic of experts."""
