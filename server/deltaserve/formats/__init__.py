"""Checkpoints in, deltas out: one lowering for each library that writes them."""
