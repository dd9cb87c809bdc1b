"""Where a delta's bytes are: host RAM and device, each with a byte budget."""
