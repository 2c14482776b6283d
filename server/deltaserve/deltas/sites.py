"""Where in a backbone a delta may act, told without the backbone: what formats need to lower and to validate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

Weights = Callable[[str], torch.Tensor]
"""The backbone's weight at a site, by its name: host fp32 [out, in], of an embedding [vocabulary, width]; slow.

Of a module that has one and is no site: as it is stored.
"""


class Axis(StrEnum):
    """A row dimension of a forward. Every wrapped module works on the rows of exactly one."""

    TOKENS = "tokens"  # encoder rows, or those of a decoder-only backbone
    DECODER = "decoder"  # decoder rows of an encoder-decoder
    MEMORY = "memory"  # encoder rows whose cross-attention keys and values are made in this forward
    SAMPLED = "sampled"  # rows that get logits
    POOLED = "pooled"  # rows that go through a pooler


class SiteType(StrEnum):
    LINEAR = "linear"
    CONV1D = "conv1d"  # transformers' Conv1D: weight stored [in, out]
    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"


class Task(StrEnum):
    """What a delta answers."""

    GENERATION = "generation"
    SEQUENCE_CLASSIFICATION = "sequence_classification"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"  # extractive: spans of the input
    MULTIPLE_CHOICE = "multiple_choice"
    EMBEDDING = "embedding"


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What the outputs of a head with labels mean, in transformers' words."""


class Pooling(StrEnum):
    """How rows become one vector, or which row a head reads."""

    MEAN = "mean"
    CLS = "cls"  # the first row (of the soft prompt, if there is one)
    POOLER = "pooler"  # the first row through the backbone's own pooler
    POOLER_MEAN = "pooler_mean"  # the mean of all rows (of the soft prompt's too), through that pooler
    POOLER_TOKENS = "pooler_tokens"  # every row through that pooler
    LAST = "last"  # the last row
    LAST_REAL = "last_real"  # the last row whose id is not the pad id (transformers' decoder-only classifiers)
    TOKENS = "tokens"  # every row


THROUGH_POOLER = frozenset({Pooling.POOLER, Pooling.POOLER_MEAN, Pooling.POOLER_TOKENS})
"""What only a backbone with a pooler has."""


@dataclass(frozen=True, eq=False)
class Site:
    """One module of the backbone. `in_features` and `out_features` are logical, whatever the storage.

    For an embedding: vocabulary and width. For a norm: width twice. For an attention: `kv_heads`, `head_dim`.
    `bias` is a host fp32 copy [out], or None. `factor` is what an embedding multiplies looked-up rows by (Gemma).
    """

    name: str
    type: SiteType
    axis: Axis
    in_features: int = 0
    out_features: int = 0
    bias: torch.Tensor | None = None
    kv_heads: int = 0
    head_dim: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class HeadSpec:
    """The head of one task in this family, as transformers' class for it names it.

    `layers` lists (module path below the head's own name or "", activation after it); `module` is the head's name.
    `outputs`: how many it has, where these are not labels; None: one for each label. `base`: what this class calls the
    base model, where that is not what the family's others do.
    """

    module: str
    pooling: Pooling
    layers: tuple[tuple[str, str | None], ...] = (("", None),)
    outputs: int | None = None
    base: str | None = None

    def read(self, prompted: bool) -> Pooling:
        """What it reads. Given embeddings instead of ids, transformers' decoder classifiers cannot see padding."""
        return Pooling.LAST if self.pooling is Pooling.LAST_REAL and prompted else self.pooling


class Part(StrEnum):
    """What a sublayer is."""

    ATTENTION = "attention"
    CROSS_ATTENTION = "cross_attention"
    FEED_FORWARD = "feed_forward"


@dataclass(frozen=True)
class Sublayer:
    """One residual step of a layer: r + last(… first(norm(r)) …), or with `post` norm(r + last(… first(r) …)).

    `first` names the sites that the sublayer's input goes to, `last` the one whose output is added to the stream,
    `norm` the norm that stands before or behind (ModernBERT's first is an Identity, and no site). `sandwich`: the norm
    between `last` and the sum (Gemma2, Gemma3). `layer` counts through a whole backbone: an encoder-decoder's decoder
    goes on where its encoder ends.
    """

    layer: int
    part: Part
    first: tuple[str, ...]
    last: str
    norm: str
    post: bool
    decoder: bool = False
    sandwich: str | None = None


@dataclass(frozen=True, eq=False)
class BackboneSpec:
    """A backbone as a format sees it.

    `sites`: by canonical name, which is the module's name in transformers' task model (`bert.encoder.layer.0...`).
    `modules`: every module name of the task model in its order, heads excluded, for matching a config's targets.
    `prefix`: the task model's name for the base model (`bert`, `transformer`, `model`, or "" for T5): checkpoints of
    the bare base model leave it out.
    `prefix_sites`: attention sites that prefix-tuning fills, by layer; none where transformers' code does not let it.
    `prefix_positions`: whether a prefix shifts the positions of real tokens. `prefix_pre`: relative position of prefix
    row p for query i is p − i + prefix_pre · n. `input_embedding`: the site that looks tokens up; `tied`: the other
    sites that have its weight. `first_position`: of a sequence's first row (RoBERTa begins behind its pad id).
    `max_positions`: rows of one sequence at most, or None where positions are relative. `sublayers`: every one, in the
    order of a forward; none where a family's layers are built otherwise (a parallel residual): adapters that need more
    than a site's own output are refused there.
    """

    name: str
    family: str
    sites: Mapping[str, Site]
    modules: tuple[str, ...]
    prefix: str
    hidden_size: int
    vocab_size: int
    prefix_sites: tuple[str, ...]
    prefix_positions: bool
    heads: Mapping[Task, HeadSpec]
    tasks: frozenset[str]
    encoder_decoder: bool = False
    prefix_pre: int = 0
    input_embedding: str = ""
    tied: tuple[str, ...] = ()
    first_position: int = 0
    max_positions: int | None = None
    sublayers: tuple[Sublayer, ...] = ()
