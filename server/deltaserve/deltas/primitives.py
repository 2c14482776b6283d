"""The few operations that every delta is made of; see each class for its equation.

All tensors are on the host, contiguous (but for views of a base, see `Delta`), and in the dtype of the checkpoint's
file. Rows x are [rows, in], outputs y are [rows, out]. Products and sums are taken in fp32 and rounded once, at the end
of a site.

At one linear the order is fixed: x′ = Block_in(x); u = x′ ⊙ in_scale; y = W u + b; Dense, LowRank and Sparse are
computed from u and added; Rows replace outputs; y = Block_out(y); y = y ⊙ scale + shift; then the adapters (see
`adapters`), in turn.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deltaserve.deltas.adapters import Adapter, Coupling, Gate


@dataclass(frozen=True, eq=False)
class LowRank:
    """y += scale · outer ⊙ (u Aᵀ D Bᵀ), A [r, in], B [out, r], outer [out]; inner [r] is D's diagonal, or [r, r] Dᵀ.

    None is ones. LoRA (arXiv 2106.09685) has A and B alone. Where those are frozen and shared, inner and outer are what
    was learned: VeRA (arXiv 2310.11454).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    inner: torch.Tensor | None = None
    outer: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """Input side: u = x ⊙ in_scale, [in]. Output side: y = y ⊙ scale + shift, both [out]. None leaves that part out.

    IA³ (arXiv 2205.05638), biases of BitFit (arXiv 2106.10199); at a norm it acts on the norm's output. With `replace`,
    at a norm alone: scale is the norm's weight and shift its bias, [width], instead of the backbone's, in the norm's
    own order of casts. LayerNorm tuning (arXiv 2312.11420).
    """

    in_scale: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    replace: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """x′ = x · diag(R_1, ..., R_n) on the input side, or y′ = y · diag(...) on the output side. blocks [n, b, b].

    Or blocks [m, b, b, s], the rows as [m, b, s]: each block turns numbers that stand s apart. OFT (arXiv 2306.07280)
    and BOFT (2311.06243) on the input side; RoAd (2409.00119) on the output side, in blocks [m, 2, 2, s]. At an
    embedding the output side alone, the rows that were looked up.
    """

    blocks: torch.Tensor
    outputs: bool = False


@dataclass(frozen=True, eq=False)
class Sparse:
    """y += u Sᵀ, S[index[0], index[1]] = values; index int32 [2, n], values [n]. SHiRA (arXiv 2406.13175)."""

    index: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """At an embedding these ids look up other rows; at a vocabulary linear y[:, index] = u valuesᵀ.

    index int32 [n], sorted and distinct; values [n, width]. Trainable tokens.
    """

    index: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """y += u Wᵀ + b, W [out, in], b [out] or None; with `replace`, y = u Wᵀ + b instead of the backbone's product."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    replace: bool = False


@dataclass(frozen=True, eq=False)
class Prefix:
    """Attention reads these keys and values first; every row of the request sees all of them.

    keys, values [n, kv_heads, head_dim], raw: neither rotated nor normed. With T5's relative bias, prefix row p has
    relative position p − i + pre for query i, token j has j − i + tok; `biased` False: this layer adds no bias at all.
    There may be no rows at all. A `gate`, read from what the attention module gets, multiplies the keys by its first
    number and the values by its last. Prefix-tuning (arXiv 2101.00190).
    """

    keys: torch.Tensor
    values: torch.Tensor
    pre: int = 0
    tok: int = 0
    biased: bool = True
    gate: Gate | None = None


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """Rows [n, hidden] put before the token embeddings of the input. Prompt tuning (arXiv 2104.08691).

    With `place` they stand in what the embedding module gives, behind so many of the input's rows, untouched by
    position embeddings and norm; the positions of all tokens stay.
    """

    rows: torch.Tensor
    place: int | None = None


@dataclass(frozen=True, eq=False)
class HeadLayer:
    """h = act(h Wᵀ + b). W [out, in]; b [out] or None; act None or `tanh`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: str | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """The task head: its layers one after the other over pooled rows; the last one's width is the number of labels."""

    layers: tuple[HeadLayer, ...]

    @property
    def width(self) -> int:
        return int(self.layers[-1].weight.shape[0])


SitePrimitive = LowRank | Affine | Block | Dense | Sparse | Rows | Prefix | Adapter


def tensors(part: SitePrimitive | SoftPrompt | Head | Coupling) -> tuple[torch.Tensor, ...]:
    """Every tensor a part of a delta holds, in the order of its fields."""
    return tuple(_tensors(part))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
