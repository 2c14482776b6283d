"""Frozen tensors that many deltas share, VeRA's random matrices for one: what tells them apart, and views of them.

A base is known by its content, never by a name that a checkpoint gives it: the same bytes are the same base.
"""

import hashlib
from collections.abc import Mapping

import torch

Bases = Mapping[str, torch.Tensor]
"""By `content_key`, contiguous."""


def content_key(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a host tensor, in hexadecimal."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def base_of(tensor: torch.Tensor, bases: Bases) -> str | None:
    """The key of the base that a tensor is a view of, or None where its memory is its own."""
    at = tensor.data_ptr()
    for key, base in bases.items():
        start = base.data_ptr()
        if tensor.device == base.device and start <= at < start + base.numel() * base.element_size():
            return key
    return None


def same_view(view: torch.Tensor, base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of `other`, a copy of `base` (in another place or dtype), what `view` is of `base`."""
    assert other.shape == base.shape and other.is_contiguous() and base.is_contiguous()
    offset = (view.data_ptr() - base.data_ptr()) // base.element_size()
    return other.as_strided(view.shape, view.stride(), other.storage_offset() + offset)
