"""Making a model use less of its feed-forward networks, without a router."""
