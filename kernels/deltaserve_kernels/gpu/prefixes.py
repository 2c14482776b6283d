"""What attention knows of each slot's prefix at one site: a Board over a PrefixTable."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from deltaserve_kernels.attention.paths import Pair
from deltaserve_kernels.attention.prefix import PrefixTable
from deltaserve_kernels.gpu.board import KINDS, Board
from deltaserve_kernels.slots import Entry

COLUMNS = 7
"""Kind, K, V, rows, `pre`, `tok`, biased. The kind is that of the cache."""
_ALIGNED = 16
"""Bytes: what the kernel takes for granted of addresses."""


def board(prefix: PrefixTable, dtype: torch.dtype, heads: int, width: int) -> torch.Tensor:
    """int64 [capacity, COLUMNS] for keys and values [n, heads, width] that are read as `dtype`.

    A prefix of another dtype than the cache's is copied to it when it is first seen, and its copy lives as long as it.
    Raises ValueError where a prefix has other heads.
    """
    name = f"prefixes {dtype} {heads} {width}"
    found = prefix.kept.get(name)
    if found is None:
        found = prefix.kept[name] = Board(prefix, COLUMNS, _row(dtype, heads, width))
    assert isinstance(found, Board)
    return found.rows()


def _row(dtype: torch.dtype, heads: int, width: int) -> Callable[[int, Entry], tuple[int, ...]]:
    copies: WeakKeyDictionary[Entry, Pair] = WeakKeyDictionary()

    def row(_: int, entry: Entry) -> tuple[int, ...]:
        keys, values = entry.tensors
        assert keys is not None and values is not None
        if not keys.shape == values.shape == (keys.shape[0], heads, width):
            shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
            raise ValueError(f"prefix: keys and values are {shapes}; this attention has {heads} KV heads of {width}")
        if any(t.dtype != dtype or t.data_ptr() % _ALIGNED for t in (keys, values)):
            keys, values = copies[entry] = (_copy(keys, dtype), _copy(values, dtype))
        pre, tok, biased = entry.scalars
        return (KINDS[dtype], keys.data_ptr(), values.data_ptr(), keys.shape[0], int(pre), int(tok), int(biased != 0))

    return row


def _copy(given: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return given.to(dtype, copy=True).contiguous()
