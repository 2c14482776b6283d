"""Stacked copies of what several slots have at one site: one batched product instead of a loop over short runs."""

from collections.abc import Callable, Hashable, Sequence

import torch

from deltaserve_kernels.rowmap import Run
from deltaserve_kernels.slots import Entry

SHORT = 4
"""Rows of a run up to which a product over stacked weights beats one of its own."""

_SETS = 2

Found = list[tuple[Run, Entry]]
Stack = tuple[torch.Tensor | None, ...]


def parted(found: Found) -> tuple[Found, Found]:
    """The short runs, if there are several of them, and all others."""
    short = [each for each in found if each[0].rows <= SHORT]
    if len(short) < 2:
        return [], found
    return short, [each for each in found if each[0].rows > SHORT] if len(short) < len(found) else []


class Stacks:
    """For the sets of slots that a site met last, `make` of their entries; _SETS of each group, anew after a change.

    A group is of slots whose entries can stand in one stack: of one shape, of ranks that are near.
    """

    def __init__(self, make: Callable[[Sequence[Entry]], Stack]) -> None:
        self._make = make
        self._held: dict[Hashable, dict[tuple[int, ...], Stack]] = {}
        self._generation = -1

    def of(self, found: Found, generation: int, group: Hashable = None) -> Stack:
        """The stack of these runs' slots, in their order; `generation` is the table's."""
        if self._generation != generation:
            self._held.clear()
            self._generation = generation
        held = self._held.setdefault(group, {})
        slots = tuple([run.slot for run, _ in found])
        stack = held.get(slots)
        if stack is None:
            if len(held) >= _SETS:
                held.pop(next(iter(held)))
            stack = held[slots] = self._make([entry for _, entry in found])
        return stack

    @property
    def nbytes(self) -> int:
        stacks = (stack for held in self._held.values() for stack in held.values())
        return sum(t.numel() * t.element_size() for stack in stacks for t in stack if t is not None)
