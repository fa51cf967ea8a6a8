"""Converted models in the forms that other software reads."""

from moesaic.models.export._table import FORMATS

__all__ = ["FORMATS"]
