"""PEFT's types and how each is lowered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import LowRank, tensors
from deltaserve.deltas.sites import PROBLEM_TYPES, BackboneSpec, HeadSpec, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition, InvalidArgument
from deltaserve.formats.folder import Folder
from deltaserve.formats.peft import (
    costs,
    dense,
    frozen,
    heads,
    ia3,
    lora,
    lowrank,
    norms,
    ofweight,
    options,
    prompts,
    shared,
    sparse,
    spectra,
    spectral,
    tokens,
    turns,
    vectors,
)
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.options import Options, shown
from deltaserve.formats.peft.refused import REFUSED
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.work import UNLIMITED, Work

_TUNER = ("base_model.model.",)
_SHARED = ("base_model.model.", "base_model.")
"""Tensors that modules share hang on the tuner itself."""
_PROMPT = ("base_model.", "")
"""Heads beside a prompt hang on the model itself, and the prompt on nothing."""


@dataclass(frozen=True)
class Type:
    """One row of the table. `dotted`: what may stand before the module path of its tensors.

    `tasks`: the config's key for how many tasks a checkpoint is for, each a delta of its own; None: it has no tasks.
    """

    options: Options
    lower: Callable[[Checkpoint, Draft, Weights], None]
    dotted: tuple[str, ...] = _TUNER
    tasks: str | None = None


TYPES: Mapping[str, Type] = {
    "LORA": Type(lora.OPTIONS, lora.lower),
    "IA3": Type(ia3.OPTIONS, ia3.lower),
    "ADALORA": Type(lowrank.ADALORA_OPTIONS, lowrank.adalora),
    "DELORA": Type(lowrank.DELORA_OPTIONS, lowrank.delora),
    "GRALORA": Type(lowrank.GRALORA_OPTIONS, lowrank.gralora),
    "HRA": Type(lowrank.HRA_OPTIONS, lowrank.hra),
    "MISS": Type(lowrank.MISS_OPTIONS, lowrank.miss),
    "VERA": Type(shared.VERA_OPTIONS, shared.vera, _SHARED),
    "PVERA": Type(shared.PVERA_OPTIONS, shared.pvera, _SHARED),
    "VBLORA": Type(shared.VBLORA_OPTIONS, shared.vblora, _SHARED),
    "LOHA": Type(dense.LOHA_OPTIONS, dense.loha),
    "LOKR": Type(dense.LOKR_OPTIONS, dense.lokr),
    "UNILORA": Type(vectors.UNILORA_OPTIONS, vectors.unilora, _SHARED),
    "TINYLORA": Type(vectors.TINYLORA_OPTIONS, vectors.tinylora, _SHARED),
    "POLY": Type(vectors.POLY_OPTIONS, vectors.poly, tasks="n_tasks"),
    "RANDLORA": Type(frozen.RANDLORA_OPTIONS, frozen.randlora, _SHARED),
    "FROD": Type(frozen.FROD_OPTIONS, frozen.frod, _SHARED),
    "FOURIERFT": Type(spectra.FOURIERFT_OPTIONS, spectra.fourierft),
    "WAVEFT": Type(spectra.WAVEFT_OPTIONS, spectra.waveft),
    "PSOFT": Type(spectral.PSOFT_OPTIONS, spectral.psoft),
    "OSF": Type(spectral.OSF_OPTIONS, spectral.osf),
    "DEFT": Type(ofweight.DEFT_OPTIONS, ofweight.deft),
    "PEANUT": Type(ofweight.PEANUT_OPTIONS, ofweight.peanut),
    "GLORA": Type(ofweight.GLORA_OPTIONS, ofweight.glora),
    "C3A": Type(dense.C3A_OPTIONS, dense.c3a),
    "HIRA": Type(dense.HIRA_OPTIONS, dense.hira),
    "OFT": Type(turns.OFT_OPTIONS, turns.oft),
    "BOFT": Type(turns.BOFT_OPTIONS, turns.boft),
    "ROAD": Type(turns.ROAD_OPTIONS, turns.road),
    "SHIRA": Type(sparse.SHIRA_OPTIONS, sparse.shira),
    "SUPERTUNING": Type(sparse.SUPERTUNING_OPTIONS, sparse.supertuning),
    "LN_TUNING": Type(norms.LN_TUNING_OPTIONS, norms.ln_tuning),
    "BEFT": Type(norms.BEFT_OPTIONS, norms.beft),
    "TRAINABLE_TOKENS": Type(tokens.OPTIONS, tokens.lower),
    "PREFIX_TUNING": Type(prompts.PREFIX_OPTIONS, prompts.lower_prefix, _PROMPT),
    "PROMPT_TUNING": Type(prompts.PROMPT_OPTIONS, prompts.lower_prompt, _PROMPT),
    "P_TUNING": Type(prompts.P_TUNING_OPTIONS, prompts.lower_prompt, _PROMPT),
    "CPT": Type(prompts.CPT_OPTIONS, prompts.lower_prompt, _PROMPT),
    "MULTITASK_PROMPT_TUNING": Type(prompts.MULTITASK_OPTIONS, prompts.lower_multitask, _PROMPT, "num_tasks"),
    "CARTRIDGE": Type(prompts.CARTRIDGE_OPTIONS, prompts.lower_prefix, _PROMPT),
}

KINDS = (
    *("lora", "dora", "alora", "adalora", "delora", "gralora", "hra", "miss", "vera", "pvera", "vblora"),
    *("loha", "lokr", "fourierft", "c3a", "hira", "oft", "boft", "road", "shira", "supertuning", "ln-tuning"),
    *("unilora", "tinylora", "poly", "randlora", "frod", "waveft", "psoft", "osf", "deft", "peanut", "glora"),
    *("beft", "ia3", "prefix-tuning", "cartridge", "prompt-tuning", "p-tuning", "cpt", "multitask-prompt-tuning"),
    *("trainable-tokens", "bias", "head", "selective-module"),
)
"""What a delta may say it is: its methods first, what goes with them after."""


def lower(folder: Folder, backbone: BackboneSpec, weights: Weights, wanted: Wanted, work: Work = UNLIMITED) -> Delta:
    """A PEFT checkpoint as a delta for this backbone. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    config = folder.config()
    row = _type(config)
    row.options.check(config)
    draft = Draft(options.task_id(config, row.tasks, wanted.task_id))
    checkpoint = Checkpoint(folder, config, backbone, wanted, row.dotted, work)
    costs.check(checkpoint)
    task, guessed = heads.task_of(checkpoint)
    head = heads.lower(checkpoint, draft, task)
    row.lower(checkpoint, draft, weights)
    checkpoint.finish()
    _check_numbers(draft)
    if draft.nothing():
        checkpoint.warnings.append("all its numbers are those of a fresh start: it changes nothing")
    labels, problem, assumed = _labels(checkpoint, draft, head)
    return Delta(
        # The method first, what goes with it after.
        kinds=tuple(sorted(draft.kinds, key=KINDS.index)),
        at=draft.at,
        task=task,
        provenance=Provenance(
            format="peft",
            content_hash=folder.content_hash(),
            file_bytes=folder.tensor_bytes,
            tensors_matched=checkpoint.taken,
            base_model=str(config.get("base_model_name_or_path") or "")[:500],
            warnings=tuple(checkpoint.warnings),
            guessed=(("task",) if guessed else ()) + assumed,
        ),
        prompt=draft.prompt,
        position_shift=draft.position_shift,
        head=draft.head,
        pooling=None if head is None else head.read(draft.prompt is not None),
        labels=labels,
        problem_type=problem,
        task_id=draft.task_id,
        # PEFT's model for question answering keeps token_type_ids to itself: it was trained without.
        token_types=config.get("task_type") != "QUESTION_ANS",
        bases=draft.bases,
        invocation=draft.invocation,
    )


_LARGEST = torch.finfo(torch.float32).max


def _check_numbers(draft: Draft) -> None:
    """Each number of the file is finite; what a lowering makes of them may not be. Raises BadCheckpoint."""
    for name, primitives in draft.at.items():
        for primitive in primitives:
            scaled = not isinstance(primitive, LowRank) or (abs(primitive.scale) <= _LARGEST and fits(primitive))
            if not scaled or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors(primitive)):
                raise BadCheckpoint(
                    f"the numbers for {name!r} are finite, and what they come to is not in float32; was the training "
                    "stable?",
                    metadata={"module": name},
                )


def fits(part: LowRank) -> bool:
    """Whether inner times A and outer times B are finite in float32."""
    scaled = [(matrix, by.double()) for matrix, by in ((part.a, part.inner), (part.b, part.outer)) if by is not None]
    made = (by @ m.double() if by.ndim == 2 else by * m.abs().amax(1).double() for m, by in scaled)
    return all(bool((product.abs() <= _LARGEST).all()) for product in made)


def _type(config: Mapping[str, Any]) -> Type:
    named = config.get("peft_type")
    row = TYPES.get(named) if isinstance(named, str) else None
    if row is None:
        if isinstance(named, str) and named in REFUSED:
            raise FailedPrecondition(
                f"config key 'peft_type' is {named!r}, which this release does not serve: {REFUSED[named]}",
                reason="KIND_NOT_SERVED",
                metadata={"peft_type": named},
            )
        raise FailedPrecondition(
            f"config key 'peft_type' is {shown(named)}; this release serves {', '.join(TYPES)}",
            reason="KIND_NOT_SERVED",
            metadata={"peft_type": shown(named), "served": ",".join(TYPES)},
        )
    return row


def _labels(
    checkpoint: Checkpoint, draft: Draft, head: HeadSpec | None
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Labels, problem type, and which of the two were guessed. Spans and choices have neither."""
    wanted, width = checkpoint.wanted, 0 if draft.head is None else draft.head.width
    if head is not None and head.outputs is not None:
        for field in ("labels", "problem_type"):
            if getattr(wanted, field):
                raise InvalidArgument(f"{field}: the outputs of the head {head.module!r} are no labels", field=field)
        return (), None, ()
    if wanted.labels and len(wanted.labels) != width:
        raise InvalidArgument(f"{len(wanted.labels)} labels for a head of {width} outputs", field="labels")
    if not width:
        if wanted.problem_type:
            raise InvalidArgument("problem_type is for deltas that have a head", field="problem_type")
        return (), None, ()
    model = checkpoint.folder.model_config()
    guessed: list[str] = []
    labels = wanted.labels or _named(model, width)
    if not labels:
        labels = tuple(f"LABEL_{i}" for i in range(width))
        guessed.append("labels")
    problem = wanted.problem_type or model.get("problem_type")
    if problem not in PROBLEM_TYPES:
        problem = "regression" if width == 1 else "single_label_classification"
        guessed.append("problem_type")
    return labels, str(problem), tuple(guessed)


def _named(model: Mapping[str, Any], width: int) -> tuple[str, ...]:
    """Names from transformers' `id2label`, if it names exactly the head's outputs."""
    told = model.get("id2label")
    if not isinstance(told, dict) or len(told) != width:
        return ()
    names = tuple(name for i in range(width) if isinstance(name := told.get(str(i)), str))
    return names if len(names) == width else ()
