"""Trainable tokens: single rows of an embedding, and the outputs of the vocabulary's linear that are tied to them."""

from collections.abc import Mapping
from typing import Any

import torch

from deltaserve.deltas.primitives import Rows
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
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
    """LoRA's trainable_token_indices: a list, for the input embedding, or lists by module; what is tied follows."""
    told = checkpoint.config.get("trainable_token_indices")
    if not told:
        return
    draft.kind(KIND)
    backbone = checkpoint.backbone
    tables: Mapping[str, Any] = told if isinstance(told, dict) else {backbone.input_embedding.rpartition(".")[2]: told}
    for key, numbers in tables.items():
        ids = _ids(checkpoint, numbers, f"trainable_token_indices[{key!r}]")
        found = [
            name
            for name, site in backbone.sites.items()
            if site.type is SiteType.EMBEDDING
            and (checkpoint.own(name) == key or name.endswith(f".{key}"))
            and checkpoint.has(f"{name}.token_adapter.trainable_tokens_delta")
        ]
        if not found:
            raise BadCheckpoint(
                f"config key 'trainable_token_indices' names {key!r}; the checkpoint has no rows for it"
            )
        for name in found:
            rows = _rows(checkpoint, name, "token_adapter.trainable_tokens_delta", ids)
            for site in (name, *(backbone.tied if name == backbone.input_embedding else ())):
                draft.put(site, rows)


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
