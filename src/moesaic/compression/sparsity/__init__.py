"""Keeping every weight and using fewer of them for each token, without a router."""
