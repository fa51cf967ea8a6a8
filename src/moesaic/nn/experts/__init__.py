"""Experts: what a token is sent through."""
