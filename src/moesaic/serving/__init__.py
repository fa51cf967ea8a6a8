"""Serving a model to others, with the protocol of OpenAI; needs the extra `serve`."""
