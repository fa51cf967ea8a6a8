"""A server beside the engine inside it: what HTTP costs."""
