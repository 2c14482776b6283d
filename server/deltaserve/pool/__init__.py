"""The deltas that are resident on the device, under a byte budget."""
