"""modules_to_save: the task's head, and other modules that a checkpoint brings whole."""

import torch

from deltaserve.deltas.primitives import Affine, Dense, Head
from deltaserve.deltas.sites import HeadSpec, Site, SiteType, Task
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.heads import CLASSIFIES, GUESSED, head_of, layers_of
from deltaserve.formats.peft import options, ties
from deltaserve.formats.peft.checkpoint import Checkpoint

_TASKS = {
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "QUESTION_ANS": Task.QUESTION_ANSWERING,
    "CAUSAL_LM": Task.GENERATION,
    "SEQ_2_SEQ_LM": Task.GENERATION,
    "FEATURE_EXTRACTION": Task.EMBEDDING,
}


def task_of(checkpoint: Checkpoint) -> tuple[Task, bool]:
    """What the delta is for, and whether that was guessed. Raises FailedPrecondition for a task not served."""
    if checkpoint.wanted.task is not None:
        return checkpoint.wanted.task, False
    told = checkpoint.config.get("task_type")
    if isinstance(told, str) and told in _TASKS:
        return _TASKS[told], False
    if told is not None:
        raise FailedPrecondition(
            f"config key 'task_type' is {options.shown(told)}; this release serves {', '.join(_TASKS)}",
            reason="TASK_NOT_SERVED",
            metadata={"key": "task_type"},
        )
    for task in GUESSED:
        head = checkpoint.backbone.heads.get(task)
        if head is not None and checkpoint.below(head.module):
            return task, True
    return (Task.GENERATION if "generate" in checkpoint.backbone.tasks else Task.EMBEDDING), True


def lower(checkpoint: Checkpoint, draft: Draft, task: Task) -> HeadSpec | None:
    """Takes the head's tensors and every other saved module; returns what is known of the head, if there is one."""
    head = _head_spec(checkpoint, task)
    if head is not None:
        draft.head = _head(checkpoint, head)
        draft.kind("head")
    _drop_foreign_heads(checkpoint, head)
    _modules(checkpoint, draft)
    return head


def _head_spec(checkpoint: Checkpoint, task: Task) -> HeadSpec | None:
    if task not in CLASSIFIES:
        return None
    head = head_of(task, checkpoint.backbone)
    if not checkpoint.below(head.module):
        raise BadCheckpoint(
            f"the delta is for {task.value}, and the checkpoint has no tensors of its head {head.module!r}; "
            "load it with the task that it was made for"
        )
    return head


def _head(checkpoint: Checkpoint, spec: HeadSpec) -> Head:
    head = layers_of(checkpoint, spec, checkpoint.backbone.hidden_size)
    if checkpoint.config.get("bias") == "all":
        # PEFT also saves the biases of the wrapper's two inner copies of a head; the plain names are those that act.
        for inner in ("original_module", "modules_to_save"):
            for copy in checkpoint.below(f"{spec.module}.{inner}"):
                checkpoint.drop(copy)
    return head


def _drop_foreign_heads(checkpoint: Checkpoint, mine: HeadSpec | None) -> None:
    """The operator named a task without a head for a checkpoint that has one."""
    for head in checkpoint.backbone.heads.values():
        names = checkpoint.below(head.module)
        if names and mine is None and checkpoint.wanted.task is not None:
            for name in names:
                checkpoint.drop(name)
            checkpoint.warnings.append(f"the head {head.module!r} is left out: the task is {checkpoint.wanted.task}")


def _modules(checkpoint: Checkpoint, draft: Draft) -> None:
    saved = options.listed(checkpoint.config, "modules_to_save")
    if not saved:
        return
    tied = ties.saved(checkpoint)
    for name, site in checkpoint.backbone.sites.items():
        if name in tied:
            continue
        own = checkpoint.own(name)
        parts = [own.rsplit(".", cut)[0] for cut in range(own.count(".") + 1)]
        if any(part.endswith(saved) for part in parts) and checkpoint.below(name):
            _module(checkpoint, draft, name, site)
    for name in tied:
        _follow(checkpoint, draft, name)


def _follow(checkpoint: Checkpoint, draft: Draft, name: str) -> None:
    """A module that is tied to an embedding of the delta's own. Raises BadCheckpoint where its weight is another."""
    source, site = checkpoint.backbone.input_embedding, checkpoint.backbone.sites[name]
    held = next((part for part in draft.at.get(source, ()) if isinstance(part, Dense)), None)
    if held is None or site.type is not SiteType.LINEAR:
        raise BadCheckpoint(
            f"config key 'ensure_weight_tying' is true, and {name!r} cannot have the saved weight of {source!r}",
            metadata={"module": name},
        )
    if not torch.equal(checkpoint.take(f"{name}.weight", tuple(held.weight.shape)), held.weight):
        raise BadCheckpoint(
            f"config key 'ensure_weight_tying' is true, and the weight of {name!r} is not that of {source!r}",
            metadata={"module": name},
        )
    # A base is stored once for both.
    draft.put(name, Dense(draft.base(held.weight), site.bias, replace=True))


def _module(checkpoint: Checkpoint, draft: Draft, name: str, site: Site) -> None:
    """A module of the delta's own. An embedding's copy leaves what was tied to it with the backbone's weight."""
    shapes = {
        SiteType.LINEAR: (site.out_features, site.in_features),
        SiteType.CONV1D: (site.in_features, site.out_features),
        SiteType.EMBEDDING: (site.in_features, site.out_features),
        SiteType.NORM: (site.out_features,),
    }
    if site.type not in shapes:
        raise FailedPrecondition(
            f"config key 'modules_to_save' brings {name!r} whole, of type {site.type}; this release serves heads, "
            "linear layers, norms and embeddings so",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "modules_to_save", "module": name},
        )
    weight = checkpoint.take(f"{name}.weight", shapes[site.type])
    bias = checkpoint.take(f"{name}.bias", (site.out_features,)) if site.bias is not None else None
    draft.kind("selective-module")
    if site.type is SiteType.NORM:
        draft.put(name, Affine(scale=weight, shift=bias, replace=True))
    else:
        turned = site.type is SiteType.CONV1D
        draft.put(name, Dense(weight.T.contiguous() if turned else weight, bias, replace=True))
