"""Everything one forward needs, built once per forward; and Now, its holder."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from deltaserve.deltas.sites import Axis
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import RowMap


@dataclass(frozen=True)
class PromptPiece:
    """Rows [row, row + count) of a stack are soft-prompt rows [offset, offset + count) of a slot."""

    slot: int
    row: int
    offset: int
    count: int


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


KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Now:
    """The forward that is running. Shared by all wrapped modules of one backbone; written by the engine's thread alone.

    `cache`: keys and values [tokens, kv_heads, head_dim] by attention site.
    """

    plan: Plan | None = None
    cache: Mapping[str, KeysValues] = field(default_factory=dict)

    def rowmap(self, axis: Axis) -> RowMap:
        assert self.plan is not None, "a wrapped module ran outside a forward"
        return self.plan.maps[axis]
