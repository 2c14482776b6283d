"""Everything one forward needs, built once per forward; and Now, its holder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from deltaserve.deltas.adapters import Positions
from deltaserve.deltas.sites import Axis
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import Grid, RowMap


@dataclass(frozen=True)
class PromptPiece:
    """Rows [row, row + count) of a stack are soft-prompt rows [offset, offset + count) of a slot.

    `placed`: of what the embedding module gives, instead of what it gets.
    """

    slot: int
    row: int
    offset: int
    count: int
    placed: bool = False


@dataclass(frozen=True, eq=False)
class Stack:
    """The rows that enter one stack of layers: ids int64 [rows], any id where a soft prompt stands.

    `positions` and `token_types` are int64 [rows]; families with relative positions ignore them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    token_types: torch.Tensor
    prompts: tuple[PromptPiece, ...] = ()

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])


@dataclass(frozen=True, eq=False)
class Plan:
    """One forward.

    `maps`: a RowMap for every axis. `attention`: who attends to what, by the axis of the attention's keys (cross-
    attention is `memory`). `tokens` or `decoder` may be None (T5 with nobody to encode, or nobody to decode).
    `memory`: rows of `tokens` whose cross keys and values are made, int64. `sampled`: rows that get logits, of
    `decoder` if the backbone has one, else of `tokens`. `pooled`: rows of `tokens` for the backbone's pooler; where
    `averaged` is given, it gets the mean of so many of them in turn.
    """

    maps: Mapping[Axis, RowMap]
    attention: Mapping[Axis, Sequences]
    tokens: Stack | None
    decoder: Stack | None
    memory: torch.Tensor
    sampled: torch.Tensor
    pooled: torch.Tensor
    averaged: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Prompted:
    """Where a slot's soft prompt stands in each of its sequences: `rows` of it, behind `place` rows of their own."""

    rows: int
    place: int = 0


KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Now:
    """The forward that is running. Shared by all wrapped modules of one backbone; written by the engine's thread alone.

    `cache`: keys and values [tokens, kv_heads, head_dim] by attention site. `prompted`: where soft prompts stand. For
    the length of one forward: `kept`, what modules were given, [rows, width] by name, until the adapters that read it
    have; `instead`, rows that stand for what a norm gives, by its name: where, and [n, width]; `reached`, an axis's map
    with those rows alone that `Positions` names.
    """

    plan: Plan | None = None
    cache: Mapping[str, KeysValues] = field(default_factory=dict)
    prompted: dict[int, Prompted] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    instead: dict[str, list[tuple[Grid, torch.Tensor]]] = field(default_factory=dict)
    reached: dict[tuple[Axis, Positions], RowMap] = field(default_factory=dict)

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Within, `plan` is the one of the forward that runs."""
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None
            self.kept.clear()
            self.instead.clear()
            self.reached.clear()

    def rowmap(self, axis: Axis) -> RowMap:
        assert self.plan is not None, "a wrapped module ran outside a forward"
        return self.plan.maps[axis]
