"""Stacked copies of what several slots have at one site: one batched product instead of a loop over short runs."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from deltaserve_kernels.rowmap import Grid, RowMap, Run
from deltaserve_kernels.slots import Entry

SHORT = 4
"""Rows of a run up to which a product over stacked weights beats one of its own."""

_SETS = 2

Found = list[tuple[Run, Entry]]
Stack = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs whose slots stand in one stack, and their rows. `alike`: what their entries have in common."""

    found: Found
    alike: Hashable
    slots: tuple[int, ...]
    grid: Grid

    @classmethod
    def of(cls, found: Found, alike: Hashable, rowmap: RowMap) -> "Group":
        return cls(found, alike, tuple([run.slot for run, _ in found]), rowmap.grid([run for run, _ in found]))

    def by_row(self) -> "Group":
        """The same with an entry for each row, whose stack has a row for each."""
        rows = [each for each in self.found for _ in range(each[0].rows)]
        return Group(rows, self.alike, tuple([run.slot for run, _ in rows]), self.grid)


@dataclass(frozen=True, eq=False)
class Groups:
    """What a forward meets at a site: groups of short runs, and `alone` the runs that are computed each by itself."""

    together: tuple[Group, ...]
    alone: Found


def grouped(
    found: Found,
    rowmap: RowMap,
    alike: Callable[[Entry], Hashable],
    merged: Callable[[dict[Hashable, Found]], dict[Hashable, Found]] = lambda groups: groups,
    least: int = 2,
) -> Groups:
    """Short runs by what `alike` says of their entries, then as `merged` joins them; groups of `least` runs or more."""
    by: dict[Hashable, Found] = {}
    for each in found:
        if each[0].rows <= SHORT:
            by.setdefault(alike(each[1]), []).append(each)
    groups = merged(by)
    few: Iterable[Found] = (members for members in groups.values() if len(members) < least)
    return Groups(
        tuple(Group.of(members, key, rowmap) for key, members in groups.items() if len(members) >= least),
        [*(each for each in found if each[0].rows > SHORT), *(each for members in few for each in members)],
    )


def by_row(found: Found, rowmap: RowMap) -> Groups:
    """Short runs in one group, whose stack has a row for each row, not for each slot."""
    groups = grouped(found, rowmap, lambda _: None)
    return Groups(tuple(group.by_row() for group in groups.together), groups.alone)


def bucket(width: int) -> int:
    """A power of two, 8 at least: widths of one bucket are padded to the largest, which wastes less than half."""
    return max(8, 1 << (width - 1).bit_length())


class Stacks:
    """For the sets of slots that a site met last, `make` of their entries; _SETS of each group, anew after a change.

    A group is of slots whose entries can stand in one stack: of one shape, of ranks that are near.
    """

    def __init__(self, make: Callable[[Sequence[Entry]], Stack]) -> None:
        self._make = make
        self._held: dict[Hashable, dict[tuple[int, ...], Stack]] = {}
        self._generation = -1

    def of(self, group: Group, generation: int) -> Stack:
        """The stack of a group's slots, in their order; `generation` is the table's."""
        if self._generation != generation:
            self._held.clear()
            self._generation = generation
        held = self._held.setdefault(group.alike, {})
        stack = held.get(group.slots)
        if stack is None:
            if len(held) >= _SETS:
                held.pop(next(iter(held)))
            stack = held[group.slots] = self._make([entry for _, entry in group.found])
        return stack

    @property
    def nbytes(self) -> int:
        stacks = (stack for held in self._held.values() for stack in held.values())
        return sum(t.numel() * t.element_size() for stack in stacks for t in stack if t is not None)
