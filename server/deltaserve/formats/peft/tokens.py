"""Trainable tokens: single rows of an embedding, and the outputs of the vocabulary's linear that are tied to them."""

from collections.abc import Mapping
from typing import Any

import torch

from deltaserve.deltas.primitives import Rows
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TRAINED

OPTIONS = options.Options(used=frozenset({"target_modules", "token_indices"}), inert=TRAINED)
KIND = "trainable-tokens"


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """E[index] is replaced; the checkpoint has the same rows for each module that is tied."""
    del weights
    draft.kind(KIND)
    ids = _ids(checkpoint, checkpoint.config.get("token_indices"), "token_indices")
    found = [name for name in checkpoint.backbone.sites if checkpoint.has(f"{name}.trainable_tokens_delta")]
    if not found:
        raise BadCheckpoint("the checkpoint holds no trainable_tokens_delta for a module of this backbone")
    for name in found:
        draft.put(name, _rows(checkpoint, name, "trainable_tokens_delta", ids))


def beside_lora(checkpoint: Checkpoint, draft: Draft) -> None:
    """LoRA's trainable_token_indices: a list, for the input embedding, or lists by module; what is tied follows.

    A module is an embedding, or the vocabulary's linear.
    """
    told = checkpoint.config.get("trainable_token_indices")
    if not told:
        return
    draft.kind(KIND)
    backbone = checkpoint.backbone
    tables: Mapping[str, Any] = told if isinstance(told, dict) else {backbone.input_embedding.rpartition(".")[2]: told}
    named = {key: _named(checkpoint, key) for key in tables}
    alike = (backbone.input_embedding, *backbone.tied)
    # Two lists for what is tied: where they are one, PEFT keeps the embedding's rows alone; else each has its own.
    told_of_tied = [tables[key] for key, names in named.items() if any(name in alike for name in names)]
    together = all(numbers == told_of_tied[0] for numbers in told_of_tied)
    led = any(backbone.input_embedding in names for names in named.values())
    for key, numbers in tables.items():
        ids = _ids(checkpoint, numbers, f"trainable_token_indices[{key!r}]")
        found = [name for name in named[key] if checkpoint.has(f"{name}.token_adapter.trainable_tokens_delta")]
        if not found and together and led and named[key] and all(name in backbone.tied for name in named[key]):
            continue
        if not found:
            raise BadCheckpoint(
                f"config key 'trainable_token_indices' names {key!r}; the checkpoint has no rows for it"
            )
        for name in found:
            rows = _rows(checkpoint, name, "token_adapter.trainable_tokens_delta", ids)
            follows = backbone.tied if together and name == backbone.input_embedding else ()
            for site in (name, *follows):
                draft.put(site, rows)


def _named(checkpoint: Checkpoint, key: str) -> list[str]:
    return [
        name
        for name, site in checkpoint.backbone.sites.items()
        if site.type in (SiteType.EMBEDDING, SiteType.LINEAR)
        and (checkpoint.own(name) == key or name.endswith(f".{key}"))
    ]


def _ids(checkpoint: Checkpoint, told: Any, key: str) -> list[int]:
    limit = checkpoint.backbone.vocab_size
    if not isinstance(told, list) or not told or len(told) > limit:
        raise BadCheckpoint(f"config key {key} is {str(told)[:80]}; a list of token ids is expected")
    wrong = [one for one in told if type(one) is not int or not 0 <= one < limit]
    if wrong or len(set(told)) != len(told):
        raise BadCheckpoint(f"config key {key}: {wrong[:1] or 'an id twice'}; distinct ids below {limit} are needed")
    return told


def _rows(checkpoint: Checkpoint, name: str, part: str, ids: list[int]) -> Rows:
    site = checkpoint.backbone.sites[name]
    width = site.out_features if site.type is SiteType.EMBEDDING else site.in_features
    values = checkpoint.take(f"{name}.{part}", (len(ids), width))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return Rows(torch.tensor([ids[i] for i in order], dtype=torch.int32), values[order].contiguous())
