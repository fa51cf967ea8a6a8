"""Running a converted or dense model: one decode engine, shared by all that generate."""
