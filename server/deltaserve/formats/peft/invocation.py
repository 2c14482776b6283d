"""Activated LoRA (arXiv 2504.12397): PEFT adds it on the tokens from the last occurrence of an invocation on."""

from collections.abc import Mapping
from typing import Any

from deltaserve.deltas.sites import SiteType
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options, starts
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.targets import Target

KEY = "alora_invocation_tokens"
LONGEST = 256

_ALONE = ("use_dora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config", "target_parameters")
"""Options that PEFT itself cannot combine with an invocation."""
_FLAT: Mapping[str, tuple[str, ...]] = {"opt": ("fc1", "fc2")}
"""Modules that transformers gives the rows of a whole batch on one axis; PEFT's mask does not fit there."""


def lower(checkpoint: Checkpoint, draft: Draft) -> None:
    """Notes the invocation, if the config has one.

    A row has one slot, and before the invocation it has none: a part that acts on every row is refused beside it.
    Raises BadCheckpoint for what PEFT cannot load, FailedPrecondition for what this release does not serve.
    """
    config = checkpoint.config
    told = config.get(KEY)
    if not told:
        return
    tokens = _tokens(told, checkpoint.backbone.vocab_size)
    causal = "generate" in checkpoint.backbone.tasks and not checkpoint.backbone.encoder_decoder
    if config.get("task_type") != "CAUSAL_LM" or not causal:
        raise options.not_served(KEY, told, "PEFT looks for it in decoder-only models of task_type CAUSAL_LM alone")
    for key in _ALONE:
        if config.get(key):
            raise options.wrong(key, f"is set beside {KEY}; PEFT allows one of them")
    if config.get("init_lora_weights") == "mica":
        raise options.wrong("init_lora_weights", f"is 'mica' beside {KEY}; PEFT allows one of them")
    everywhere = _everywhere(config)
    if everywhere:
        why = f"it acts on every token, and beside {KEY} this release serves no such part"
        raise options.not_served(everywhere[0], config[everywhere[0]], why)
    if draft.head is not None:
        raise options.not_served(KEY, told, "the head beside it acts on every token")
    draft.kind("alora")
    draft.invocation = tokens
    checkpoint.warn(
        f"acts from the last occurrence of the tokens {options.shown(list(tokens))} on; an input without them is "
        "answered by the bare backbone"
    )


def check(target: Target) -> None:
    """Raises BadCheckpoint or FailedPrecondition for a module where PEFT cannot start at an invocation."""
    if not target.draft.invocation:
        return
    if target.site.type is SiteType.EMBEDDING:
        raise options.wrong("target_modules", f"means the embedding {target.own!r}; beside {KEY} PEFT cannot do that")
    if target.own.rpartition(".")[2] in _FLAT.get(target.checkpoint.backbone.family, ()):
        raise options.not_served(KEY, list(target.draft.invocation), f"PEFT itself cannot run it at {target.own!r}")


def _everywhere(config: Mapping[str, Any]) -> list[str]:
    """The keys whose part acts before the invocation too."""
    found = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    if options.choice(config, "bias", ("none", "all", "lora_only")) != "none":
        found.append("bias")
    if starts.taken(config.get("init_lora_weights")) is not None:
        found.append("init_lora_weights")
    return found


def _tokens(told: object, limit: int) -> tuple[int, ...]:
    if not isinstance(told, list) or len(told) > LONGEST:
        raise BadCheckpoint(
            f"config key {KEY!r} is {options.shown(told)}; a list of at most {LONGEST} token ids is expected"
        )
    for one in told:
        if type(one) is not int or not 0 <= one < limit:
            raise BadCheckpoint(
                f"config key {KEY!r} holds {options.shown(one)}; token ids of this backbone are from 0 to {limit - 1}"
            )
    return tuple(told)
