"""The families of backbones, one row each: what transformers' code for them does not say about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from deltaserve.deltas.sites import Axis, HeadSpec, Part, Pooling, Task
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
class SublayerRow:
    """Sublayers of one kind, one in each layer of a stack: names of modules, with `{}` where the layer's number stands.

    Of `first` those count that a model has (T5 is gated or not). See `deltas.sites.Sublayer`.
    """

    part: Part
    first: tuple[str, ...]
    last: str
    norm: str
    sandwich: str | None = None
    decoder: bool = False


@dataclass(frozen=True)
class Family:
    """One row of the table.

    `axes`: (pattern, axis) for modules that do not work on `tokens` rows; the first full match wins.
    `prefix`: the task model's name for the base model. `base_only`: the base model is loaded, without its prefix.
    `unused`: modules of the loader's class that nothing here runs; they are dropped, and may be missing on disk.
    `head_dim` names the attribute of an attention module. `prefix_axis`: whose attentions prefix-tuning fills, or None
    where transformers' code takes no keys and values from outside. `prefix_pre`: see BackboneSpec.
    `pooler`: module that makes the pooled row, or None. `embedded`: module whose output are the rows that enter the
    first layer, None where what the input embedding gives does. By the model's config: `averages`: whether a sequence's
    pooler reads the mean of its rows instead of the first; `first_position`: of a text, where that is not 0;
    `post_norm`: whether its norms stand behind their sublayers; `objection`: why a model of this type is not served
    after all, or None. `sublayers`: those of one layer in the order of a forward, none where they do not follow one
    another.
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
    embedded: str | None = None
    sublayers: tuple[SublayerRow, ...] = ()
    post_norm: Callable[[Any], bool] = lambda _: False
    averages: Callable[[Any], bool] = lambda _: False
    first_position: Callable[[Any], int] = lambda _: 0
    objection: Callable[[Any], str | None] = lambda _: None


_ALL_JOBS = frozenset({"generate", "classify", "embed", "score"})
_SAMPLED = ((r"lm_head", Axis.SAMPLED),)


_LAYER = "model.layers.{}."


def _attention(
    layer: str,
    *first: str,
    last: str,
    norm: str,
    sandwich: str | None = None,
    part: Part = Part.ATTENTION,
    decoder: bool = False,
) -> SublayerRow:
    """A sublayer whose modules' names all begin with `layer`."""
    own = None if sandwich is None else layer + sandwich
    return SublayerRow(part, tuple(layer + name for name in first), layer + last, layer + norm, own, decoder)


def _feed_forward(layer: str, *first: str, last: str, norm: str, **known: Any) -> SublayerRow:
    return _attention(layer, *first, last=last, norm=norm, part=Part.FEED_FORWARD, **known)


_LLAMA_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA_SUBLAYERS = (
    _attention(_LAYER, *_LLAMA_ATTENTION, last="self_attn.o_proj", norm="input_layernorm"),
    _feed_forward(_LAYER, *_LLAMA_FEED_FORWARD, last="mlp.down_proj", norm="post_attention_layernorm"),
)
_SANDWICHED = (
    _attention(
        _LAYER,
        *_LLAMA_ATTENTION,
        last="self_attn.o_proj",
        norm="input_layernorm",
        sandwich="post_attention_layernorm",
    ),
    _feed_forward(
        _LAYER,
        *_LLAMA_FEED_FORWARD,
        last="mlp.down_proj",
        norm="pre_feedforward_layernorm",
        sandwich="post_feedforward_layernorm",
    ),
)


def _t5_stack(stack: str) -> tuple[SublayerRow, ...]:
    decoder = stack == "decoder"
    block, last = stack + ".block.{}.layer.", 2 if decoder else 1
    own = [f"SelfAttention.{name}" for name in "qkv"]
    feeding = [f"DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")]
    rows = [_attention(block + "0.", *own, last="SelfAttention.o", norm="layer_norm", decoder=decoder)]
    if decoder:
        # Its keys and values are made of the encoder's rows.
        cross: dict[str, Any] = {"part": Part.CROSS_ATTENTION, "decoder": True}
        rows.append(_attention(block + "1.", "EncDecAttention.q", last="EncDecAttention.o", norm="layer_norm", **cross))
    rows.append(
        _feed_forward(block + f"{last}.", *feeding, last="DenseReluDense.wo", norm="layer_norm", decoder=decoder)
    )
    return tuple(rows)


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
        "sublayers": _LLAMA_SUBLAYERS,
    }
    return Family(name=name, model_types=model_types or (name,), **(row | changes))


def _encoder(name: str, head: HeadSpec, **changes: Any) -> Family:
    """An encoder built like BERT; `head` is that of its sequence classifier."""
    layer = name + ".encoder.layer.{}."
    attention = [f"attention.self.{word}" for word in ("query", "key", "value")]
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
        embedded=f"{name}.embeddings",
        sublayers=(
            _attention(layer, *attention, last="attention.output.dense", norm="attention.output.LayerNorm"),
            _feed_forward(layer, "intermediate.dense", last="output.dense", norm="output.LayerNorm"),
        ),
        post_norm=lambda _: True,
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
        sublayers=_t5_stack("encoder") + _t5_stack("decoder"),
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
        embedded="model.embeddings",
        sublayers=(
            _attention(_LAYER, "attn.Wqkv", last="attn.Wo", norm="attn_norm"),
            _feed_forward(_LAYER, "mlp.Wi", last="mlp.Wo", norm="mlp_norm"),
        ),
        averages=lambda config: config.classifier_pooling == "mean",
    ),
    _decoder(
        "gpt2",
        labels="classifier",
        spans=_spans(),
        attentions=(AttentionRow(r"transformer\.h\.\d+\.attn", Axis.TOKENS, causal=True, cached=True),),
        prefix="transformer",
        embedded="transformer.drop",
        sublayers=(
            _attention("transformer.h.{}.", "attn.c_attn", last="attn.c_proj", norm="ln_1"),
            _feed_forward("transformer.h.{}.", "mlp.c_fc", last="mlp.c_proj", norm="ln_2"),
        ),
    ),
    _decoder("llama", spans=_spans("transformer")),
    _decoder("mistral", spans=_spans()),
    _decoder("qwen2", spans=_spans("transformer")),
    _decoder("qwen3", spans=_spans("transformer")),
    _decoder("gemma"),
    _decoder("gemma2", sublayers=_SANDWICHED),
    _decoder("gemma3", "gemma3_text", labels=None, sublayers=_SANDWICHED),
    _decoder(
        "phi3",
        sublayers=(
            _attention(_LAYER, "self_attn.qkv_proj", last="self_attn.o_proj", norm="input_layernorm"),
            _feed_forward(_LAYER, "mlp.gate_up_proj", last="mlp.down_proj", norm="post_attention_layernorm"),
        ),
    ),
    _decoder(
        "opt",
        labels=None,
        spans=_spans(),
        attentions=(AttentionRow(r"model\.decoder\.layers\.\d+\.self_attn", Axis.TOKENS, causal=True, cached=True),),
        sublayers=(
            _attention(
                "model.decoder.layers.{}.",
                *_LLAMA_ATTENTION,
                last="self_attn.out_proj",
                norm="self_attn_layer_norm",
            ),
            _feed_forward("model.decoder.layers.{}.", "fc1", last="fc2", norm="final_layer_norm"),
        ),
        post_norm=lambda config: not config.do_layer_norm_before,
        objection=_projected,
    ),
    _decoder(
        "gpt_neox",
        labels="classifier",
        spans=_spans(),
        attentions=(AttentionRow(r"gpt_neox\.layers\.\d+\.attention", Axis.TOKENS, causal=True, cached=True),),
        head_dim="head_size",
        prefix="gpt_neox",
        sublayers=(),
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
