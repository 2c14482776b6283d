"""Attention over packed rows: contiguous caches, prefixes, T5's relative bias, windows, grouped heads."""

from deltaserve_kernels.attention.attend import attend
from deltaserve_kernels.attention.bias import RelativeBias
from deltaserve_kernels.attention.prefix import PrefixTable
from deltaserve_kernels.attention.sequences import Sequence, Sequences

__all__ = ["PrefixTable", "RelativeBias", "Sequence", "Sequences", "attend"]
