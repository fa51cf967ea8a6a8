"""Schedules: values of routers that change over training."""
