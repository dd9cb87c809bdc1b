"""The backbone on its device: loading, sites, attention over the KV cache, placed deltas."""
