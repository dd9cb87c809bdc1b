"""Deltas at rest: normal form, formats, validation, store, registry."""
