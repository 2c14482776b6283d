"""Frozen tensors that many deltas share, VeRA's random matrices for one: what tells them apart, and views of them.

A base is known by its content, never by a name that a checkpoint gives it: the same bytes are the same base.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping

import torch

Bases = Mapping[str, torch.Tensor]
"""By `content_key`, contiguous."""


def content_key(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a host tensor, in hexadecimal."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(octets(tensor))
    return found.hexdigest()


def octets(tensor: torch.Tensor) -> memoryview:
    """The bytes of a host tensor in its order; no copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


class Owners:
    """Whose memory a tensor lies in. Tensors and bases are on one device."""

    def __init__(self, bases: Bases) -> None:
        ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), key) for key, t in bases.items()]
        self._spans = sorted(ends)

    def base_of(self, tensor: torch.Tensor) -> str | None:
        """The key of the base that a tensor is a view of, or None where its memory is its own."""
        if not self._spans:
            return None
        at = tensor.data_ptr()
        place = bisect_right(self._spans, at, key=lambda span: span[0]) - 1
        start, end, key = self._spans[place]
        return key if start <= at < end else None


def same_view(view: torch.Tensor, base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of `other`, a copy of `base` (in another place or dtype), what `view` is of `base`."""
    assert other.shape == base.shape and other.is_contiguous() and base.is_contiguous()
    offset = (view.data_ptr() - base.data_ptr()) // base.element_size()
    return other.as_strided(view.shape, view.stride(), other.storage_offset() + offset)
