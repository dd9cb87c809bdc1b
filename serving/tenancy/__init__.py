"""Who calls and what they may: tenants, keys, grants. Neither HTTP nor Ray."""
