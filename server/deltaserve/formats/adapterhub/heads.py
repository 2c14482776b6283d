"""Heads beside an adapter: those of the library's flexible models, and those of transformers' classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaserve.deltas.adapters import Bottleneck, OwnNorm, Tap
from deltaserve.deltas.primitives import Affine, Dense, Head, HeadLayer
from deltaserve.deltas.sites import THROUGH_POOLER, Axis, BackboneSpec, HeadSpec, Pooling, SiteType, Task, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.configs import activation
from deltaserve.formats.adapterhub.member import Below
from deltaserve.formats.adapterhub.places import layer_of
from deltaserve.formats.draft import Draft
from deltaserve.formats.folder import Folder
from deltaserve.formats.heads import CLASSIFIES, OUTPUTS, head_of, layers_of
from deltaserve.formats.options import shown
from deltaserve.formats.wanted import Wanted

MOST_LAYERS = 16
MOST_LABELS = 100_000
_EPS = 1e-12
"""Of the library's norms in heads that end in a vocabulary: that of the backbone's config has another name here."""

_POOLED = {"classification", "multilabel_classification", "multiple_choice"}
_FLEXIBLE: Mapping[str, Task] = {
    "classification": Task.SEQUENCE_CLASSIFICATION,
    "multilabel_classification": Task.SEQUENCE_CLASSIFICATION,
    "multiple_choice": Task.MULTIPLE_CHOICE,
    "tagging": Task.TOKEN_CLASSIFICATION,
    "question_answering": Task.QUESTION_ANSWERING,
    "causal_lm": Task.GENERATION,
    "seq2seq_lm": Task.GENERATION,
    "masked_lm": Task.EMBEDDING,
}
_STATIC: tuple[tuple[str, Task], ...] = (
    ("ForSequenceClassification", Task.SEQUENCE_CLASSIFICATION),
    ("ForTokenClassification", Task.TOKEN_CLASSIFICATION),
    ("ForQuestionAnswering", Task.QUESTION_ANSWERING),
    ("ForMultipleChoice", Task.MULTIPLE_CHOICE),
    ("LMHeadModel", Task.GENERATION),
    ("ForCausalLM", Task.GENERATION),
    ("ForConditionalGeneration", Task.GENERATION),
    ("ForMaskedLM", Task.EMBEDDING),
)
"""transformers' classes by the ends of their names."""


@dataclass(frozen=True)
class Headed:
    """What the delta is for. `model`: names of labels and the kind of problem, in the words of transformers' config.

    `through`: it answers by a head of its own that ends in a vocabulary.
    """

    task: Task
    guessed: bool
    spec: HeadSpec | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    through: bool = False


def lower(
    folder: Folder | None, backbone: BackboneSpec, wanted: Wanted, draft: Draft, weights: Weights
) -> tuple[Headed, Below | None]:
    """The head, if the folder has one for what is wanted. Raises BadCheckpoint, FailedPrecondition."""
    if folder is None:
        return _headless(backbone, wanted), None
    config, tensors = folder.config(), Below(folder, backbone)
    told = config.get("config")
    kind = told.get("head_type") if isinstance(told, dict) else None
    task = _flexible(kind) if isinstance(told, dict) else _static(config)
    mine = wanted.task or task
    if task is Task.EMBEDDING or (mine is not task and mine not in CLASSIFIES):
        for name in tensors.names():
            tensors.drop(name)
        why = f"the task is {mine.value}" if mine is not task else "this release answers no masked language modelling"
        tensors.warn(f"the head of the checkpoint is left out: {why}")
        return Headed(mine, wanted.task is None), tensors
    if mine is not task:
        raise BadCheckpoint(
            f"the delta is for {mine.value}, and the checkpoint's head is for {task.value}; load it with the task "
            "that it was made for"
        )
    if "generate" in backbone.tasks and backbone.encoder_decoder and task in CLASSIFIES:
        head_of(task, backbone)
    if task is Task.GENERATION:
        _vocabulary(tensors, told if isinstance(told, dict) else None, config, backbone, draft, weights)
        return Headed(task, False, through=isinstance(told, dict)), tensors
    draft.kind("head")
    if isinstance(told, dict):
        spec = _flexible_head(tensors, told, config, task, backbone, draft)
        return Headed(task, False, spec, _labels(told, kind)), tensors
    spec = head_of(task, backbone)
    draft.head = layers_of(tensors, spec, backbone.hidden_size)
    return Headed(task, False, spec, _labels(config, None)), tensors


def _headless(backbone: BackboneSpec, wanted: Wanted) -> Headed:
    if wanted.task in CLASSIFIES:
        raise BadCheckpoint(
            f"the delta is for {wanted.task.value}, and the checkpoint has no head; save the adapter with its head"
        )
    usual = Task.GENERATION if "generate" in backbone.tasks else Task.EMBEDDING
    return Headed(wanted.task or usual, wanted.task is None)


def _flexible(kind: Any) -> Task:
    if not isinstance(kind, str) or kind not in _FLEXIBLE:
        raise FailedPrecondition(
            f"head_config.json: 'head_type' is {shown(kind)}; this release serves {', '.join(_FLEXIBLE)}",
            reason="TASK_NOT_SERVED",
            metadata={"key": "head_type"},
        )
    return _FLEXIBLE[kind]


def _static(config: Mapping[str, Any]) -> Task:
    name = config.get("model_class")
    for end, task in _STATIC:
        if isinstance(name, str) and name.endswith(end):
            return task
    raise FailedPrecondition(
        f"head_config.json: 'model_class' is {shown(name)}, whose head this release does not know",
        reason="TASK_NOT_SERVED",
        metadata={"key": "model_class"},
    )


def _labels(told: Mapping[str, Any], kind: str | None) -> Mapping[str, Any]:
    """As transformers' config would tell them: its id2label from a label2id."""
    given = told.get("label2id")
    named: dict[str, Any] = {}
    if isinstance(given, dict) and len(given) <= MOST_LABELS:
        for label, number in given.items():
            if type(number) is int:
                named[str(number)] = label
    many = {"problem_type": "multi_label_classification"} if kind == "multilabel_classification" else {}
    return {"id2label": named, **many}


def _flexible_head(
    tensors: Below, told: Mapping[str, Any], config: Mapping[str, Any], task: Task, backbone: BackboneSpec, draft: Draft
) -> HeadSpec:
    """Dropout, linear, activation, dropout, linear ...; names count all of them."""
    name, count = config.get("name"), options.integer(told, "layers", most=MOST_LAYERS)
    pooled = told["head_type"] in _POOLED
    outputs = OUTPUTS.get(task) if task is not Task.QUESTION_ANSWERING else options.integer(told, "num_labels", most=2)
    width = outputs or options.integer(told, "num_labels", most=MOST_LABELS)
    f = activation(told, "activation_function")
    layers, at, hidden = [], 1, backbone.hidden_size
    for number in range(count):
        last = number == count - 1
        out = width if last else hidden
        module = f"heads.{name}.{at}"
        biased = not last or options.flag(told, "bias", True)
        bias = tensors.take(f"{module}.bias", (out,)) if biased else None
        weight = tensors.take(f"{module}.weight", (out, hidden))
        layers.append(HeadLayer(weight, bias, None if last else f))
        at += 2 + bool(told.get("activation_function"))
    draft.head = Head(tuple(layers))
    pooling = _pooling(told, backbone) if pooled else Pooling.TOKENS
    return HeadSpec(f"heads.{name}"[:200], pooling, outputs=OUTPUTS.get(task))


def _pooling(told: Mapping[str, Any], backbone: BackboneSpec) -> Pooling:
    if options.flag(told, "use_pooler"):
        if not any(head.pooling in THROUGH_POOLER for head in backbone.heads.values()):
            raise options.not_served(
                "use_pooler", True, "this backbone has no pooler, and the library makes a random one of that"
            )
        return Pooling.POOLER
    return Pooling.LAST_REAL if "generate" in backbone.tasks else Pooling.CLS


def _vocabulary(
    tensors: Below,
    told: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    backbone: BackboneSpec,
    draft: Draft,
    weights: Weights,
) -> None:
    """The vocabulary's matrix, mostly the backbone's own, with a bias; before it, linear layers with own norms."""
    site = backbone.sites.get("lm_head")
    if site is None:
        raise FailedPrecondition(
            f"the checkpoint's head makes text, and this {backbone.family} backbone cannot", reason="TASK_NOT_SERVED"
        )
    if told is None:
        for name in tensors.below("prefix_tuning"):  # to the library whatever is in no stack is T5's head
            tensors.drop(name)
        at, biased = "lm_head", tensors.has("lm_head.bias")
    else:
        index = _before(tensors, told, config, backbone, draft)
        at, biased = f"heads.{config.get('name')}.{index}", options.flag(told, "bias")
    weight = tensors.take(f"{at}.weight", (site.out_features, site.in_features))
    bias = tensors.take(f"{at}.bias", (site.out_features,)) if biased else None
    ours = weights(site.name)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    if not any(torch.equal(weight.to(kind).float(), ours) for kind in kinds):
        draft.kind("selective-module")
        draft.put(site.name, Dense(weight, bias, replace=True))
    elif bias is not None and bool(bias.any()):
        draft.kind("bias")
        draft.put(site.name, Affine(shift=bias.float()))


def _before(
    tensors: Below, told: Mapping[str, Any], config: Mapping[str, Any], backbone: BackboneSpec, draft: Draft
) -> int:
    """What stands before the vocabulary's matrix, behind the last norm; the number of the matrix."""
    count = options.integer(told, "layers", 1, most=MOST_LAYERS)
    f, normed, at = activation(told, "activation_function"), options.flag(told, "layer_norm"), 0
    hidden = backbone.hidden_size
    if told.get("embedding_size", hidden) != hidden:
        raise options.not_served("embedding_size", told.get("embedding_size"), f"this release serves {hidden}")
    for _ in range(count - 1):
        module = f"heads.{config.get('name')}.{at}"
        down, bias = tensors.take(f"{module}.weight", (hidden, hidden)), tensors.take(f"{module}.bias", (hidden,))
        at += 1 + bool(told.get("activation_function"))
        own = None
        if normed:
            inner = f"heads.{config.get('name')}.{at}"
            own = OwnNorm(tensors.take(f"{inner}.weight", (hidden,)), tensors.take(f"{inner}.bias", (hidden,)), _EPS)
            at += 1
        draft.kind("head")
        draft.put(
            _last_norm(backbone),
            Bottleneck(down, torch.eye(hidden), bias, None, f, input=Tap.OUTPUT, carry=None, after=own),
        )
    return at


def _last_norm(backbone: BackboneSpec) -> str:
    """The norm whose rows the vocabulary's matrix gets."""
    axis = Axis.DECODER if backbone.encoder_decoder else Axis.TOKENS
    norms = [site.name for site in backbone.sites.values() if site.type is SiteType.NORM and site.axis is axis]
    return next(name for name in reversed(norms) if not layer_of(name))
