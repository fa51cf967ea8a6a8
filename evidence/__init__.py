"""One script per published system, each with its committed result."""
