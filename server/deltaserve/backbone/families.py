"""The families of backbones, one row each: what transformers' code for them does not say about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from deltaserve.deltas.sites import Axis, HeadSpec, Pooling, Task
from deltaserve.errors import FailedPrecondition


class Shape(StrEnum):
    """How a family's stacks of layers are put together."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_DECODER = "encoder-decoder"


@dataclass(frozen=True)
class AttentionRow:
    """Attention modules whose name matches `pattern` (a full match).

    `axis` names the axis of their keys, which finds their sequences in the plan.
    """

    pattern: str
    axis: Axis
    causal: bool
    cached: bool


@dataclass(frozen=True)
class Family:
    """One row of the table.

    `axes`: (pattern, axis) for modules that do not work on `tokens` rows; the first full match wins.
    `prefix`: the task model's name for the base model. `base_only`: the base model is loaded, without its prefix.
    `head_dim` names the attribute of an attention module. `prefix_axis`: whose attentions prefix-tuning fills.
    `prefix_pre`: see BackboneSpec. `pooler`: module that makes the pooled row, or None.
    """

    name: str
    model_types: tuple[str, ...]
    loader: str
    shape: Shape
    attentions: tuple[AttentionRow, ...]
    head_dim: str
    jobs: frozenset[str]
    prefix: str = ""
    base_only: bool = False
    axes: tuple[tuple[str, Axis], ...] = ()
    heads: Mapping[Task, HeadSpec] = field(default_factory=dict)
    prefix_axis: Axis = Axis.TOKENS
    prefix_positions: bool = True
    prefix_pre: int = 0
    absolute_positions: bool = True
    pooler: str | None = None


_ALL_JOBS = frozenset({"generate", "classify", "embed", "score"})

FAMILIES: tuple[Family, ...] = (
    Family(
        name="t5",
        model_types=("t5",),
        loader="AutoModelForSeq2SeqLM",
        shape=Shape.ENCODER_DECODER,
        attentions=(
            AttentionRow(r"encoder\.block\.\d+\.layer\.0\.SelfAttention", Axis.TOKENS, causal=False, cached=False),
            AttentionRow(r"decoder\.block\.\d+\.layer\.0\.SelfAttention", Axis.DECODER, causal=True, cached=True),
            AttentionRow(r"decoder\.block\.\d+\.layer\.1\.EncDecAttention", Axis.MEMORY, causal=False, cached=True),
        ),
        head_dim="key_value_proj_dim",
        jobs=frozenset({"generate", "embed", "score"}),
        axes=(
            (r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.[kv]", Axis.MEMORY),
            (r"decoder\..*", Axis.DECODER),
            (r"lm_head", Axis.SAMPLED),
        ),
        prefix_axis=Axis.DECODER,
        prefix_positions=False,
        prefix_pre=-1,
        absolute_positions=False,
    ),
    Family(
        name="bert",
        model_types=("bert",),
        loader="AutoModel",
        shape=Shape.ENCODER,
        attentions=(
            AttentionRow(r"bert\.encoder\.layer\.\d+\.attention\.self", Axis.TOKENS, causal=False, cached=False),
        ),
        head_dim="attention_head_size",
        jobs=frozenset({"classify", "embed"}),
        prefix="bert",
        base_only=True,
        axes=((r"bert\.pooler\..*", Axis.POOLED),),
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadSpec("classifier", Pooling.POOLER),
            Task.TOKEN_CLASSIFICATION: HeadSpec("classifier", Pooling.TOKENS),
        },
        pooler="bert.pooler",
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        loader="AutoModelForCausalLM",
        shape=Shape.DECODER,
        attentions=(AttentionRow(r"transformer\.h\.\d+\.attn", Axis.TOKENS, causal=True, cached=True),),
        head_dim="head_dim",
        jobs=_ALL_JOBS,
        prefix="transformer",
        axes=((r"lm_head", Axis.SAMPLED),),
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadSpec("score", Pooling.LAST_REAL),
            Task.TOKEN_CLASSIFICATION: HeadSpec("classifier", Pooling.TOKENS),
        },
    ),
    Family(
        name="llama",
        model_types=("llama",),
        loader="AutoModelForCausalLM",
        shape=Shape.DECODER,
        attentions=(AttentionRow(r"model\.layers\.\d+\.self_attn", Axis.TOKENS, causal=True, cached=True),),
        head_dim="head_dim",
        jobs=_ALL_JOBS,
        prefix="model",
        axes=((r"lm_head", Axis.SAMPLED),),
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadSpec("score", Pooling.LAST_REAL),
            Task.TOKEN_CLASSIFICATION: HeadSpec("score", Pooling.TOKENS),
        },
    ),
)


def family_of(model_type: str, name: str) -> Family:
    """The row for a config's `model_type`. Raises FailedPrecondition with the list of those that are served."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    served = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise FailedPrecondition(
        f"backbone {name!r} is of type {model_type!r}, which this release does not serve; it serves {served}",
        reason="BACKBONE_NOT_SERVED",
        metadata={"model_type": model_type, "served": served},
    )
