"""Loaders that lower checkpoints to deltas: one package for each library that writes them."""
