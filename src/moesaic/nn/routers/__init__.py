"""Routers: which experts a token uses."""
