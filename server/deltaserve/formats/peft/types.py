"""PEFT's types and how each is lowered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.errors import FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.folder import Folder
from deltaserve.formats.lowered import delta_of
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


def lower(folder: Folder, backbone: BackboneSpec, weights: Weights, wanted: Wanted, work: Work = UNLIMITED) -> Delta:
    """A PEFT checkpoint as a delta for this backbone. Raises BadCheckpoint, FailedPrecondition, InvalidArgument."""
    config = folder.config()
    row = _type(config)
    row.options.check(config, options.COMMON | options.INERT)
    draft = Draft(options.task_id(config, row.tasks, wanted.task_id))
    checkpoint = Checkpoint(folder, config, backbone, wanted, row.dotted, work)
    costs.check(checkpoint)
    task, guessed = heads.task_of(checkpoint)
    head = heads.lower(checkpoint, draft, task)
    row.lower(checkpoint, draft, weights)
    checkpoint.finish()
    provenance = Provenance(
        format="peft",
        content_hash=folder.content_hash(),
        file_bytes=folder.tensor_bytes,
        tensors_matched=checkpoint.taken,
        base_model=str(config.get("base_model_name_or_path") or "")[:500],
        warnings=tuple(checkpoint.warnings),
        guessed=("task",) if guessed else (),
    )
    # PEFT's model for question answering keeps token_type_ids to itself: it was trained without.
    token_types = config.get("task_type") != "QUESTION_ANS"
    return delta_of(draft, task, head, wanted, folder.model_config(), provenance, token_types=token_types)


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
