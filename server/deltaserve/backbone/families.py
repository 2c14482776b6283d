"""The families of backbones, one row each: what transformers' code for them does not say about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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
    `unused`: modules of the loader's class that nothing here runs; they are dropped, and may be missing on disk.
    `head_dim` names the attribute of an attention module. `prefix_axis`: whose attentions prefix-tuning fills, or None
    where transformers' code takes no keys and values from outside. `prefix_pre`: see BackboneSpec.
    `pooler`: module that makes the pooled row, or None. By the model's config: `averages`: whether a sequence's pooler
    reads the mean of its rows instead of the first; `first_position`: of a text, where that is not 0; `objection`: why
    a model of this type is not served after all, or None.
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
    unused: tuple[str, ...] = ()
    axes: tuple[tuple[str, Axis], ...] = ()
    heads: Mapping[Task, HeadSpec] = field(default_factory=dict)
    prefix_axis: Axis | None = Axis.TOKENS
    prefix_positions: bool = True
    prefix_pre: int = 0
    absolute_positions: bool = True
    pooler: str | None = None
    averages: Callable[[Any], bool] = lambda _: False
    first_position: Callable[[Any], int] = lambda _: 0
    objection: Callable[[Any], str | None] = lambda _: None


_ALL_JOBS = frozenset({"generate", "classify", "embed", "score"})
_SAMPLED = ((r"lm_head", Axis.SAMPLED),)


def _spans(base: str | None = None) -> HeadSpec:
    """The scores of a span's start and end at each token; its class calls the base model `base`."""
    return HeadSpec("qa_outputs", Pooling.TOKENS, outputs=2, base=base)


def _decoder(
    name: str, *model_types: str, labels: str | None = "score", spans: HeadSpec | None = None, **changes: Any
) -> Family:
    """A causal model built like Llama; `labels` is the head of its token classifier, None where it has none.

    `spans` is the head of its model for question answering, None where transformers has no such class.
    """
    heads = {Task.SEQUENCE_CLASSIFICATION: HeadSpec("score", Pooling.LAST_REAL)}
    if labels is not None:
        heads[Task.TOKEN_CLASSIFICATION] = HeadSpec(labels, Pooling.TOKENS)
    if spans is not None:
        heads[Task.QUESTION_ANSWERING] = spans
    row: dict[str, Any] = {
        "loader": "AutoModelForCausalLM",
        "shape": Shape.DECODER,
        "attentions": (AttentionRow(r"model\.layers\.\d+\.self_attn", Axis.TOKENS, causal=True, cached=True),),
        "head_dim": "head_dim",
        "jobs": _ALL_JOBS,
        "prefix": "model",
        "axes": _SAMPLED,
        "heads": heads,
    }
    return Family(name=name, model_types=model_types or (name,), **(row | changes))


def _encoder(name: str, head: HeadSpec, **changes: Any) -> Family:
    """An encoder built like BERT; `head` is that of its sequence classifier."""
    return Family(
        name=name,
        model_types=(name,),
        loader="AutoModel",
        shape=Shape.ENCODER,
        attentions=(
            AttentionRow(rf"{name}\.encoder\.layer\.\d+\.attention\.self", Axis.TOKENS, causal=False, cached=False),
        ),
        head_dim="attention_head_size",
        jobs=frozenset({"classify", "embed"}),
        prefix=name,
        base_only=True,
        axes=((rf"{name}\.pooler\..*", Axis.POOLED),),
        heads={
            Task.SEQUENCE_CLASSIFICATION: head,
            Task.TOKEN_CLASSIFICATION: HeadSpec("classifier", Pooling.TOKENS),
            Task.QUESTION_ANSWERING: _spans(),
            Task.MULTIPLE_CHOICE: HeadSpec("classifier", Pooling.POOLER, outputs=1),
        },
        pooler=f"{name}.pooler",
        **changes,
    )


def _projected(config: Any) -> str | None:
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are narrower than its layers (word_embed_proj_dim), as in OPT-350m"
    return None


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
    _encoder("bert", HeadSpec("classifier", Pooling.POOLER)),
    _encoder(
        "roberta",
        HeadSpec("classifier", Pooling.CLS, (("dense", "tanh"), ("out_proj", None))),
        first_position=lambda config: int(config.pad_token_id) + 1,
    ),
    Family(
        name="modernbert",
        model_types=("modernbert",),
        # Of its classes that have the `head` of all classifiers, the one that its checkpoints are made for.
        loader="AutoModelForMaskedLM",
        shape=Shape.ENCODER,
        attentions=(AttentionRow(r"model\.layers\.\d+\.attn", Axis.TOKENS, causal=False, cached=False),),
        head_dim="head_dim",
        jobs=frozenset({"classify", "embed"}),
        prefix="model",
        unused=("decoder",),
        axes=((r"head\..*", Axis.POOLED),),
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadSpec("classifier", Pooling.POOLER),
            Task.TOKEN_CLASSIFICATION: HeadSpec("classifier", Pooling.POOLER_TOKENS),
            Task.QUESTION_ANSWERING: HeadSpec("classifier", Pooling.POOLER_TOKENS, outputs=2),
            Task.MULTIPLE_CHOICE: HeadSpec("classifier", Pooling.POOLER, outputs=1),
        },
        prefix_axis=None,
        pooler="head",
        averages=lambda config: config.classifier_pooling == "mean",
    ),
    _decoder(
        "gpt2",
        labels="classifier",
        spans=_spans(),
        attentions=(AttentionRow(r"transformer\.h\.\d+\.attn", Axis.TOKENS, causal=True, cached=True),),
        prefix="transformer",
    ),
    _decoder("llama", spans=_spans("transformer")),
    _decoder("mistral", spans=_spans()),
    _decoder("qwen2", spans=_spans("transformer")),
    _decoder("qwen3", spans=_spans("transformer")),
    _decoder("gemma"),
    _decoder("gemma2"),
    _decoder("gemma3", "gemma3_text", labels=None),
    _decoder("phi3"),
    _decoder(
        "opt",
        labels=None,
        spans=_spans(),
        attentions=(AttentionRow(r"model\.decoder\.layers\.\d+\.self_attn", Axis.TOKENS, causal=True, cached=True),),
        objection=_projected,
    ),
    _decoder(
        "gpt_neox",
        labels="classifier",
        spans=_spans(),
        attentions=(AttentionRow(r"gpt_neox\.layers\.\d+\.attention", Axis.TOKENS, causal=True, cached=True),),
        head_dim="head_size",
        prefix="gpt_neox",
    ),
)


def family_of(config: Any, name: str) -> Family:
    """The row for a transformers config. Raises FailedPrecondition with the list of those that are served."""
    model_type = str(config.model_type)
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    if family is None:
        served = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
        raise FailedPrecondition(
            f"backbone {name!r} is of type {model_type!r}, which this release does not serve; it serves {served}",
            reason="BACKBONE_NOT_SERVED",
            metadata={"model_type": model_type, "served": served},
        )
    objection = family.objection(config)
    if objection is not None:
        raise FailedPrecondition(
            f"backbone {name!r} is of type {model_type!r}, but {objection}; this release does not serve that",
            reason="BACKBONE_NOT_SERVED",
            metadata={"model_type": model_type},
        )
    return family
