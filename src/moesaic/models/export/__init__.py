"""Converted models in the forms that other software reads."""
