"""Who attends to what in one forward: one entry for each request, for one kind of attention."""

from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Sequence:
    """Queries are rows [query_start, query_start + queries); the first has index `position` among the keys.

    Keys are [key_start, key_start + keys), of the cache if `cached`, else of this forward's key rows.
    """

    query_start: int
    queries: int
    position: int
    key_start: int
    keys: int
    slot: int
    cached: bool


@dataclass(frozen=True, eq=False)
class Sequences:
    """`write` int64 [key rows]: cache rows that this forward's keys and values go to; None: nothing is cached.

    What layers of one forward share: `buckets`, T5's distances, bucketed once, and `kept`, what kernels derive.
    """

    items: tuple[Sequence, ...]
    causal: bool
    write: torch.Tensor | None = None
    buckets: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)
    kept: dict[object, object] = field(default_factory=dict, repr=False)

    @cached_property
    def slots(self) -> frozenset[int]:
        """Of all sequences, BARE too where there is one."""
        return frozenset(sequence.slot for sequence in self.items)
