"""Frozen bases in the arena: one copy for all deltas that name its content, counted, freed with the last of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deltaserve.pool.extents import Extents


@dataclass(eq=False)
class Base:
    """`users` counts places that were reserved with it. `filled` belongs to the thread that copies."""

    key: str
    start: int
    nbytes: int
    tensor: torch.Tensor
    users: int = 0
    filled: bool = False


class Bases:
    """Of one arena. Like the pool, owned by the engine's thread, but for `filled`."""

    def __init__(self, arena: torch.Tensor, extents: Extents) -> None:
        self._arena = arena
        self._extents = extents
        self._here: dict[str, Base] = {}

    def __len__(self) -> int:
        return len(self._here)

    def take(self, wanted: Iterable[tuple[str, torch.Size, torch.dtype]]) -> tuple[Base, ...] | None:
        """Counts one user more of each base, those that are not here yet with a range of their own; or None, and does
        nothing, where there is no room."""
        taken: list[Base] = []
        for key, shape, dtype in wanted:
            base = self._here.get(key) or self._place(key, shape, dtype)
            if base is None:
                self.give(taken)
                return None
            base.users += 1
            taken.append(base)
        return tuple(taken)

    def give(self, bases: Iterable[Base]) -> int:
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

    def _place(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Base | None:
        size = shape.numel() * dtype.itemsize
        start = self._extents.take(size)
        if start is None:
            return None
        tensor = self._arena[start : start + size].view(dtype).view(shape)
        base = self._here[key] = Base(key, start, self._extents.rounded(size), tensor)
        return base
