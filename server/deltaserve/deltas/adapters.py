"""Adapters: small networks at the end of a sublayer, from AdapterHub, OpenDelta and the papers before them.

A sublayer (attention, cross-attention, feed-forward) ends in its last linear, whose output h is added to the residual
stream r. Where the norm stands before the sublayer (T5, GPT-2, Llama) the stream goes on as h + r; where it stands
behind (BERT), as LN(h + r). An adapter stands at the last linear's site: it sees what `Tap` names, and what it gives
takes the place of h, or with `replaces` of the stream behind the sublayer. Where a norm stands between that linear and
the sum (Gemma2), adapters can stand at the norm as well, and h is what it gives.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Tap(StrEnum):
    """What an adapter can read at the end of a sublayer.

    At a site that ends no sublayer there are only `own` and `output`.
    """

    OUTPUT = "output"  # h, the site's output after everything else that acts there; behind another adapter, its result
    RESIDUAL = "residual"  # r, the stream that h is added to
    SUM = "sum"  # h + r
    NORMED = "normed"  # LN(h + r), by the norm behind the sublayer or the one that the adapter names
    INPUT = "input"  # what the sublayer's first linear gets: LN(r) where the norm stands before, else r
    OWN = "own"  # what the site itself gets


class Reach(StrEnum):
    """Which of the two ends of a sequence an edit is for; a row that is in both belongs to the last."""

    FIRST = "first"
    LAST = "last"
    BOTH = "both"


@dataclass(frozen=True)
class Positions:
    """Rows of a sequence, counted over its own tokens: the first `first` and the last `last`, and of these `reach`.

    A sequence of fewer tokens is in each whole. With `last`, only where all of a sequence is in one forward. ReFT
    (arXiv 2404.03592).
    """

    first: int
    last: int
    reach: Reach = Reach.BOTH


@dataclass(frozen=True, eq=False)
class OwnNorm:
    """A LayerNorm of the adapter's own over the last dimension: weight and bias [d]. AdapterHub's `eps` is 1e-5."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float = 1e-5


@dataclass(frozen=True, eq=False)
class Gate:
    """One number a sequence: the mean over ALL of its rows u of σ(u weightᵀ + bias). weight [n, d], bias [n] or None.

    It depends on every row, later ones and the soft prompt's too, so that no cache of keys and values can reproduce it:
    only where attention is not causal. n is 1, or 2 at a prefix. UniPELT (arXiv 2110.07577).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """z = gate · (scale · f(n(u) Downᵀ + down_bias) Upᵀ + up_bias), then carry and `after`.

    Down [b, d], up [out, b], biases [b] and [out] or None for zeros; `scale` does not cover `up_bias` (a format whose
    scale does folds it). u = tap `input`; n = `before`, or identity. f is `activation`, a name in
    `deltaserve_kernels.activations`, None for identity. Then, with q = carry_scale · (tap `carry`, nothing where None):

        carry_inside: result = after(z + q);  else: result = after(z) + q

    The result takes h's place; with `replaces` it is the stream behind the sublayer: neither r nor the norm comes to
    it. `norm` is the site of the norm for Tap.NORMED where that is not the sublayer's own. `positions`: only these rows
    are edited; None: all.

    Several at one site act in turn, each on what the one before gave: that is its h, and r stays. Behind one that
    replaces, h is its result − r where the norm stands before the sublayer; where a norm stands behind the linear (also
    a sandwiched one) only the last may replace. Where no sublayer ends, at any linear, Conv1D or norm, `output` and
    `own` are all there is to read, and the result is what the site gives.

    Houlsby (arXiv 1902.00751), Pfeiffer (2005.00247), parallel (2110.04366), Compacter (2106.04647), expanded at load.
    """

    down: torch.Tensor
    up: torch.Tensor
    down_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    activation: str | None = None
    scale: float = 1.0
    input: Tap = Tap.OUTPUT
    carry: Tap | None = Tap.OUTPUT
    carry_scale: float = 1.0
    carry_inside: bool = False
    before: OwnNorm | None = None
    after: OwnNorm | None = None
    gate: Gate | None = None
    replaces: bool = False
    norm: str | None = None
    positions: Positions | None = None


@dataclass(frozen=True, eq=False)
class Fusion:
    """AdapterFusion (arXiv 2005.00247): each row attends over what the members make of it.

    Member k gives u_k = scale_k · f_k(n_k(x_k) Down_kᵀ + down_bias_k) Up_kᵀ + up_bias_k: of a member nothing else but
    its `input` counts. With q = carry_scale · (tap `carry`, nothing where None), and t = tap `query_tap`:

        members_carry: u_k := u_k + q before both products, and no + q at the end
        p = softmax_k((Wq t + bq) · (Wk u_k + bk));   c = Σ_k p_k · Wv u_k + q

    query, key, value [d, d], None for identity; biases [d]. Then as in Bottleneck: `after` and `carry_inside`,
    `replaces`, `norm`. No division by √d.
    """

    members: tuple[Bottleneck, ...]
    query: torch.Tensor | None = None
    query_bias: torch.Tensor | None = None
    key: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value: torch.Tensor | None = None
    query_tap: Tap = Tap.OUTPUT
    carry: Tap | None = Tap.OUTPUT
    carry_scale: float = 1.0
    members_carry: bool = False
    carry_inside: bool = False
    after: OwnNorm | None = None
    replaces: bool = False
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class Net:
    """f(x) = act(x Downᵀ + down_bias) Upᵀ + up_bias; down [b, d], up [d, b]."""

    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    activation: str | None = None


@dataclass(frozen=True, eq=False)
class Coupling:
    """An invertible block on embedded rows e = [x1, x2], halves: y1 = x1 + F(x2), y2 = x2 + G(y1).

    With `undone` the rows before the vocabulary linear go through its inverse: y2 = x2 − G(x1), y1 = x1 − F(y2). NICE
    (arXiv 1410.8516), in MAD-X (2005.00052). Of an encoder-decoder the encoder's rows alone. It acts on what the
    embedding module gives (BERT: behind its norm; GPT-2: with positions; Gemma: in front of the multiplication); the
    soft prompt's rows go through it too, unless they are placed.
    """

    f: Net
    g: Net
    undone: bool = False


Adapter = Bottleneck | Fusion
