"""Benchmarks against the dense model: each a function that returns plain data."""
