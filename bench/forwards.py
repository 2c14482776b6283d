"""The same rows of some requests as two forwards: ours, packed; and transformers' own, one batch of equal lengths."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from bench.shapes import Twins
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.planner import Planner
from deltaserve.engine.request import DeltaRef, Job, Request, Sampling
from deltaserve.engine.scheduler import Batch, Chunk
from deltaserve.engine.sequence import Sequence as Running
from deltaserve.plan import Plan
from deltaserve.pool.pool import Resident


@dataclass(frozen=True, eq=False)
class Forwards:
    """`ours(plan)` and `plain(model)` give the same numbers in the same order; `plan(slots)` lays the rows out.

    `plain` takes a model of the backbone's dtype or of float32. `restore` is to be called before each `plain`:
    transformers' cache grows, and is cut back.
    """

    plan: Callable[[Sequence[int]], Plan]
    ours: Callable[[Plan], torch.Tensor]
    plain: Callable[..., torch.Tensor]
    restore: Callable[[], None]


def encode(pair: Twins, requests: int, tokens: int, seed: int, prompt: int = 0) -> Forwards:
    """Hidden rows of `requests` inputs of `tokens` tokens each; an encoder.

    With `prompt`, deltas bring as many soft-prompt rows; a bare request has as many more tokens.
    """
    ids = _ids(pair.ours, requests, prompt + tokens, seed)
    planner, given = Planner(pair.ours), ids.to(pair.ours.device)

    def plan(slots: Sequence[int]) -> Plan:
        chunks = []
        for number, (slot, row) in enumerate(zip(slots, ids.tolist(), strict=True)):
            bare = slot < 0 or not prompt
            ref = None if bare else DeltaRef(slot, f"d{slot}@1", ("prompt-tuning",), prompt_length=prompt)
            own = tuple(row if bare else row[prompt:])
            request = Request(f"r{number}", Job.EMBED, own, delta=ref, pooling=Pooling.MEAN)
            chunks.append(Chunk(running(pair.ours, request, slot), 0, prompt + tokens))
        return planner.layout(Batch((), tuple(chunks))).plan

    def ours(plan: Plan) -> torch.Tensor:
        hidden = pair.ours.forward(plan).tokens
        assert hidden is not None
        return hidden

    @torch.inference_mode()
    def plain(model: PreTrainedModel, **more: Any) -> torch.Tensor:
        hidden = model(input_ids=given, **more).last_hidden_state
        assert isinstance(hidden, torch.Tensor)
        return hidden.flatten(0, 1)

    return Forwards(plan, ours, plain, lambda: None)


def decode(pair: Twins, requests: int, context: int, seed: int) -> Forwards:
    """Logits of the next token of `requests` sequences that have `context` tokens in the cache; a decoder."""
    ours_, device = pair.ours, pair.ours.device
    ids = _ids(ours_, requests, context + 1, seed)
    planner, given = Planner(ours_), ids[:, -1:].to(device)
    room = context + 1
    cache = _filled(ours_, requests, room, seed)
    ours_.attach_cache(cache)
    theirs: dict[torch.dtype, DynamicCache] = {}
    for dtype in {ours_.dtype, torch.float32}:
        theirs[dtype] = DynamicCache()
        for layer, pair_ in enumerate(cache.values()):
            pieces = [t.unflatten(0, (requests, room))[:, :context].transpose(1, 2) for t in pair_]
            theirs[dtype].update(*(piece.to(dtype, copy=True) for piece in pieces), layer)

    def plan(slots: Sequence[int]) -> Plan:
        decoding = []
        for number, (slot, row) in enumerate(zip(slots, ids.tolist(), strict=True)):
            request = Request(f"r{number}", Job.GENERATE, tuple(row[:-1]), sampling=Sampling(max_new_tokens=8))
            sequence = running(ours_, request, slot)
            sequence.computed, sequence.output, sequence.self_start = context, [row[-1]], number * room
            decoding.append(sequence)
        return planner.layout(Batch(tuple(decoding), ())).plan

    def ours(plan: Plan) -> torch.Tensor:
        return ours_.logits(plan, ours_.forward(plan))

    @torch.inference_mode()
    def plain(model: PreTrainedModel, **more: Any) -> torch.Tensor:
        logits = model(input_ids=given, past_key_values=theirs[model.dtype], use_cache=True, **more).logits
        assert isinstance(logits, torch.Tensor)
        return logits[:, -1]

    def restore() -> None:
        for held in theirs.values():
            if grown := held.get_seq_length() - context:
                held.crop(-grown)

    return Forwards(plan, ours, plain, restore)


_keys = itertools.count(1)


def running(backbone: Backbone, request: Request, slot: int) -> Running:
    """A sequence that the engine would have admitted; slot −1 is bare."""
    place = None if slot < 0 else Resident(next(_keys), f"d{slot}@1", slot, 0, 0, ("lora",), pins=1)
    return Running(request, lambda _: None, backbone.family.shape, 0.0, place=place)


def _ids(backbone: Backbone, requests: int, tokens: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, backbone.spec.vocab_size, (requests, tokens), generator=random)


def _filled(backbone: Backbone, requests: int, room: int, seed: int) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [requests · room, kv_heads, head_dim] of every cached site, one range a request."""
    random = torch.Generator().manual_seed(seed)

    def rows(name: str) -> torch.Tensor:
        site = backbone.spec.sites[name]
        made = torch.randn(requests * room, site.kv_heads, site.head_dim, generator=random)
        return made.to(backbone.dtype).to(backbone.device)

    return {name: (rows(name), rows(name)) for name in backbone.cached_sites}
