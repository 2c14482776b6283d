"""OpenDelta's delta types and how each is lowered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec, HeadSpec, Task, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats.draft import Draft
from deltaserve.formats.folder import Folder
from deltaserve.formats.heads import CLASSIFIES, GUESSED, head_of, layers_of
from deltaserve.formats.lowered import delta_of
from deltaserve.formats.opendelta import adapters, prompts, whole
from deltaserve.formats.opendelta.checkpoint import Checkpoint
from deltaserve.formats.options import Options, shown
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.work import UNLIMITED, Work


@dataclass(frozen=True)
class Type:
    """One row of the table. `words`: those that its tensors' names have; where none is needed, `empty`.

    `alone`: the word of tensors that say all of it, so that it is lowered beside another type's config too.
    """

    words: tuple[str, ...]
    options: Options
    lower: Callable[[Checkpoint, Draft], None]
    alone: str | None = None
    empty: bool = False


TYPES: Mapping[str, Type] = {
    "adapter": Type(("adapter",), adapters.ADAPTER_OPTIONS, adapters.adapter),
    "compacter": Type(("compactor",), adapters.COMPACTER_OPTIONS, adapters.compacter),
    "low_rank_adapter": Type(("low_rank_adapter",), adapters.LOW_RANK_OPTIONS, adapters.low_rank_adapter),
    "parallel_adapter": Type(("parallel_adapter",), adapters.PARALLEL_OPTIONS, adapters.parallel_adapter),
    "lora": Type(("lora",), adapters.LORA_OPTIONS, adapters.lora),
    "prefix": Type(("prefix", "reparams"), prompts.PREFIX_OPTIONS, prompts.prefix, "prefix"),
    "soft_prompt": Type(("soft_prompt_layer",), prompts.SOFT_PROMPT_OPTIONS, prompts.soft_prompt, "soft_prompt_layer"),
    "bitfit": Type(("bitfit",), whole.BITFIT_OPTIONS, whole.bitfit, "bitfit", empty=True),
}

_COMMON = frozenset({"delta_type", "modified_modules", "exclude_modules", "common_structure", "backbone_class"})
_INERT = frozenset(
    {"backbone_checkpoint_name", "backbone_hash", "unfrozen_modules", "transformers_version", "opendelta_version"}
    | {"backend", "interactive_modify"}
)
"""These change nothing at inference. The hash is of all numbers, the delta's too: nothing can be told by it."""

_CLASSES = {
    "ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
    "ForTokenClassification": Task.TOKEN_CLASSIFICATION,
    "ForQuestionAnswering": Task.QUESTION_ANSWERING,
    "ForMultipleChoice": Task.MULTIPLE_CHOICE,
}
"""Ends of names of transformers' classes."""


def lower(folder: Folder, backbone: BackboneSpec, weights: Weights, wanted: Wanted, work: Work = UNLIMITED) -> Delta:
    """An OpenDelta checkpoint as a delta. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    config = folder.config()
    row = _type(config)
    row.options.check(config, _COMMON | _INERT)
    if wanted.task_id is not None:
        raise InvalidArgument(
            f"task_id is {wanted.task_id}; an OpenDelta checkpoint has no tasks to choose from, leave it out",
            field="task_id",
        )
    draft = Draft()
    checkpoint = Checkpoint(folder, config, backbone, weights, wanted, work)
    beside = _beside(checkpoint, row)
    task, guessed = _task_of(checkpoint)
    head = _head(checkpoint, draft, task)
    whole.lower(checkpoint, draft)
    for each in (row, *beside):
        each.lower(checkpoint, draft)
    checkpoint.finish()
    if not (draft.at or draft.prompt or draft.head):
        raise BadCheckpoint("the checkpoint holds nothing but what is in the backbone")
    provenance = Provenance(
        format="opendelta",
        content_hash=folder.content_hash(),
        file_bytes=folder.tensor_bytes,
        tensors_matched=checkpoint.taken,
        base_model=str(config.get("backbone_checkpoint_name") or "")[:500],
        warnings=tuple(checkpoint.warnings),
        guessed=("task",) if guessed else (),
    )
    return delta_of(draft, task, head, wanted, {}, provenance)


def _type(config: Mapping[str, Any]) -> Type:
    named = config.get("delta_type")
    row = TYPES.get(named) if isinstance(named, str) else None
    if row is None:
        raise FailedPrecondition(
            f"config key 'delta_type' is {shown(named)}; this release serves {', '.join(TYPES)}",
            reason="KIND_NOT_SERVED",
            metadata={"delta_type": shown(named), "served": ",".join(TYPES)},
        )
    return row


def _beside(checkpoint: Checkpoint, row: Type) -> list[Type]:
    """The other methods that have tensors here, where these need no config. Raises for those that do."""
    if not row.empty and not any(word in checkpoint.found for word in row.words):
        raise BadCheckpoint(
            f"config key 'delta_type' is {checkpoint.type!r}, and no tensor's name has "
            f"{' or '.join(map(repr, row.words))} in it"
        )
    words = [word for word in checkpoint.found if word not in row.words]
    found = [other for other in TYPES.values() if other.alone in words]
    if len(found) < len(words):
        raise FailedPrecondition(
            f"the checkpoint holds tensors of {', '.join(words)} beside those of {checkpoint.type!r}: the library "
            "keeps one method's config, and what that would say of another cannot be told; save each as a checkpoint "
            "of its own",
            reason="KIND_NOT_SERVED",
            metadata={"words": ",".join(words)},
        )
    for word in words:
        checkpoint.warn(f"its config is of {checkpoint.type!r} alone; the library would not make what {word} is for")
    return found


def _task_of(checkpoint: Checkpoint) -> tuple[Task, bool]:
    """What the delta is for, and whether that was guessed. Its class says it only where its head has tensors."""
    if checkpoint.wanted.task is not None:
        return checkpoint.wanted.task, False
    named = checkpoint.config.get("backbone_class")
    told = next((task for end, task in _CLASSES.items() if isinstance(named, str) and named.endswith(end)), None)
    for task in GUESSED if told is None else (told, *GUESSED):
        head = checkpoint.backbone.heads.get(task)
        if head is not None and checkpoint.below(head.module):
            return task, task is not told
    if told is not None:
        checkpoint.warn(
            f"trained in a {shown(named)}, and its head is not in the checkpoint: it answers as the backbone"
        )
    return (Task.GENERATION if "generate" in checkpoint.backbone.tasks else Task.EMBEDDING), True


def _head(checkpoint: Checkpoint, draft: Draft, task: Task) -> HeadSpec | None:
    """The task's head; another's is left out where the operator named a task without one."""
    spec = head_of(task, checkpoint.backbone) if task in CLASSIFIES else None
    if spec is None:
        for head in checkpoint.backbone.heads.values():
            names = checkpoint.below(head.module) if checkpoint.wanted.task is not None else ()
            for name in names:
                checkpoint.drop(name)
            if names:
                checkpoint.warn(f"the head {head.module!r} is left out: the task is {task.value}")
        return None
    if not checkpoint.below(spec.module):
        raise BadCheckpoint(
            f"the delta is for {task.value}, and the checkpoint has no tensors of its head {spec.module!r}; load it "
            "with the task that it was made for"
        )
    draft.head = layers_of(checkpoint, spec, checkpoint.backbone.hidden_size)
    draft.kind("head")
    return spec
