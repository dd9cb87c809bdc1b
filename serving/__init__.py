"""Deltas in motion: engine, model, memory, HTTP and Ray deployments."""
