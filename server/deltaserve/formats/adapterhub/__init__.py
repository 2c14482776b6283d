"""Checkpoints of AdapterHub's library `adapters` (github.com/adapter-hub/adapters) and of adapter-transformers."""

from deltaserve.formats.adapterhub.methods import lower

__all__ = ["lower"]
