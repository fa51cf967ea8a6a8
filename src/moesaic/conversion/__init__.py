"""Turning a dense model into a mixture of experts: where the cuts go and how routers start."""
