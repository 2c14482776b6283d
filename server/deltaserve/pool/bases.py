"""Frozen bases in the arena: one copy for all deltas that name its content, counted, freed with the last of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deltaserve.pool.extents import Extents


@dataclass(eq=False)
class Stored:
    """The one copy of a base. `users` counts places reserved with it; `filled` belongs to the thread that copies."""

    key: str
    start: int
    nbytes: int
    tensor: torch.Tensor
    users: int = 0
    filled: bool = False


class Bases:
    """Those of one arena. Owned by the engine's thread, like the pool."""

    def __init__(self, arena: torch.Tensor, extents: Extents) -> None:
        self._arena = arena
        self._extents = extents
        self._here: dict[str, Stored] = {}

    def take(self, wanted: Iterable[tuple[str, torch.Size, torch.dtype]]) -> tuple[Stored, ...] | None:
        """Counts one user more of each base; those that are not here yet get a range of their own.

        Does nothing and returns None where there is no room for all.
        """
        taken: list[Stored] = []
        for key, shape, dtype in wanted:
            base = self._here.get(key) or self._place(key, shape, dtype)
            if base is None:
                self.give(taken)
                return None
            base.users += 1
            taken.append(base)
        return tuple(taken)

    def give(self, bases: Iterable[Stored]) -> int:
        """Counts one user less of each; returns the bytes of those that had no other, which are free now."""
        freed = 0
        for base in bases:
            base.users -= 1
            if base.users == 0:
                del self._here[base.key]
                freed += self._extents.give(base.start)
        return freed

    def check(self) -> None:
        assert all(key == base.key and base.users > 0 for key, base in self._here.items())

    def _place(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Stored | None:
        size = shape.numel() * dtype.itemsize
        start = self._extents.take(size)
        if start is None:
            return None
        tensor = self._arena[start : start + size].view(dtype).view(shape)
        base = self._here[key] = Stored(key, start, self._extents.rounded(size), tensor)
        return base
