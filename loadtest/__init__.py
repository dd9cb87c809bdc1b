"""Measurements of deltamux: `python -m loadtest <what>` prints a table and writes JSON."""
