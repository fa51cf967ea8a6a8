"""Losses on a routing: pure functions of the routing and the token mask."""
