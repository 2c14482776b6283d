"""Which implementation runs. Decided here alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import TypeVar

import torch

Path = TypeVar("Path")


class Implementation(StrEnum):
    REFERENCE = "reference"  # obvious, slow, runs anywhere; what the others are compared with
    CPU = "cpu"
    TRITON = "triton"


_forced: ContextVar[Implementation | None] = ContextVar("deltaserve_implementation", default=None)


def choose(device: torch.device) -> Implementation:
    """The implementation for tensors on `device`."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return Implementation.CPU if device.type == "cpu" else Implementation.TRITON


def path(paths: Mapping[Implementation, Path], device: torch.device) -> Path:
    """What runs on `device`, of those that there are: the reference where its own is missing."""
    return paths.get(choose(device), paths[Implementation.REFERENCE])


@contextmanager
def forced(implementation: Implementation) -> Iterator[None]:
    """Overrides `choose` in this thread; for tests."""
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)
