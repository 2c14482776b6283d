"""The embedded default: a tiny trained backbone, its deltas, and what made them."""
