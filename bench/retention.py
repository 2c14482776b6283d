"""What a step keeps of the bare backbone's speed when its rows have deltas, beside the limit that bytes set."""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import forwards, roofline, scale, shapes
from bench.clock import Variant, interleaved, ratios
from bench.rows import Row, Spread
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.engine.planner import Planner
from deltaserve.engine.request import Job, Request, Sampling
from deltaserve.engine.scheduler import Batch, Chunk
from deltaserve.plan import Plan

BARE, WITH, COPIES = "bare", "deltas", "full copies"
KEYS = ("shape", "work", "batch", "distinct", "kind")


@dataclass(frozen=True)
class Case:
    """`batch` requests for `distinct` deltas of a kind. `tokens`: in each cache (decode), of each input (prefill)."""

    work: str
    batch: int
    distinct: int
    kind: str
    tokens: int


@dataclass(frozen=True)
class Scope:
    """What is measured on one backbone. The first cases are what one most wants to know: time may end."""

    shape: str
    cases: tuple[Case, ...]
    rounds: int


def scopes(*, tiny: bool) -> tuple[Scope, ...]:
    kinds = (*scale.KINDS, scale.MIXED)
    if tiny:
        few = tuple(Case("decode", 2, 2, kind, 6) for kind in kinds)
        return (Scope("tiny-llama", (*few, Case("prefill", 2, 2, "LoRA r8", 5)), 1),)
    decode = [Case("decode", 32, 32, kind, 512) for kind in kinds]
    decode += [Case("decode", batch, batch, kind, 512) for kind in ("LoRA r16", scale.MIXED) for batch in (1, 8, 128)]
    decode += [Case("decode", 128, distinct, "LoRA r16", 512) for distinct in (1, 8, 32)]
    prefill = [Case("prefill", 8, 8, kind, 256) for kind in kinds]
    return tuple(Scope(shape, (*decode, *prefill), 7) for shape in roofline.LARGE)


def measure(device: torch.device, end: float, *, tiny: bool) -> Iterator[Row]:
    """A row for each case that begins before `end` on the monotonic clock, one that says so for each other."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begin, planned = time.monotonic(), scopes(tiny=tiny)
    for number, scope in enumerate(planned):
        # Each backbone has its part of the time.
        own_end = begin + (end - begin) * (number + 1) / len(planned)
        if time.monotonic() >= own_end:
            yield from (_left_out(scope, case, "its time was over") for case in scope.cases)
            continue
        backbone = shapes.large(scope.shape, dtype, device)
        room = _Room(backbone, scope)
        for case in scope.cases:
            if time.monotonic() >= own_end:
                yield _left_out(scope, case, "its time was over")
                continue
            try:
                yield from room.measured(case)
            except torch.cuda.OutOfMemoryError:
                yield _left_out(scope, case, "its deltas do not fit beside the backbone and its cache")
        del room, backbone
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Room:
    """One backbone with a cache for the largest of its cases."""

    def __init__(self, backbone: Backbone, scope: Scope) -> None:
        self._backbone, self._scope = backbone, scope
        self._planner = Planner(backbone)
        tokens = max(case.batch * (case.tokens + 1) for case in scope.cases)
        sites = [backbone.spec.sites[name] for name in backbone.cached_sites]
        shape = {site.name: (tokens, site.kv_heads, site.head_dim) for site in sites}
        made = {"dtype": backbone.dtype, "device": backbone.device}
        backbone.attach_cache(
            {name: (torch.randn(rows, **made), torch.randn(rows, **made)) for name, rows in shape.items()}
        )

    def measured(self, case: Case) -> Iterator[Row]:
        backbone, device = self._backbone, self._backbone.device
        deltas = scale.several(case.kind, case.distinct, backbone.spec, device, backbone.dtype)
        for slot, delta in enumerate(deltas):
            backbone.install(slot, delta)
        try:
            bare, own = self._plan(case, [-1] * case.batch), self._plan(case, _slots(case))
            each = max(1, case.batch // case.distinct)
            alone = self._plan(case, [-1] * each)
            variants = [
                Variant(BARE, lambda: self._run(bare)),
                Variant(WITH, lambda: self._run(own)),
                Variant(COPIES, lambda: self._run(alone)),
            ]
            assert bool(torch.isfinite(self._run(own)).all()), f"{case}: what it computes is not finite"
            seconds = interleaved(variants, self._scope.rounds, device, 0, warm=self._scope.rounds > 1)
        finally:
            for slot, delta in enumerate(deltas):
                backbone.remove(slot, delta)
        limit = self._limit(case, deltas)
        kept = Spread.of(ratios(seconds[BARE], seconds[WITH]))
        fit = self._fit()
        yield Row(
            f"retention.{case.work}", "measured", self._parameters(case),
            seconds=Spread.of(seconds[WITH]), ratio=kept, against=BARE, limit=limit,
            nbytes=sum(delta.nbytes for delta in deltas), note=f"{kept.median / limit:.0%} of the limit",
        )  # fmt: skip
        if case.distinct > 1:
            copies = f"{case.distinct} forwards of {each} rows in turn: one was timed"
            seconds = {**seconds, COPIES: [case.distinct * taken for taken in seconds[COPIES]]}
            yield Row(
                f"retention.{case.work}", "measured", {**self._parameters(case), "kind": COPIES},
                seconds=Spread.of(seconds[COPIES]), ratio=Spread.of(ratios(seconds[BARE], seconds[COPIES])),
                against=BARE, nbytes=case.distinct * backbone.nbytes,
                note=f"{copies}; {fit} fit" if fit is not None else copies,
            )  # fmt: skip

    def _fit(self) -> int | None:
        """Copies of the backbone that the device has memory for."""
        if self._backbone.device.type != "cuda":
            return None
        return int(torch.cuda.mem_get_info(self._backbone.device)[1] // self._backbone.nbytes)

    def _limit(self, case: Case, deltas: list[Delta]) -> float:
        """Decoding: of bytes. Prefilling: of operations, two for each number of a weight or delta and row."""
        if case.work == "decode":
            return roofline.limit(self._backbone, deltas, case.batch, case.tokens).kept
        own = sum(delta.parameters for delta in deltas) / len(deltas)
        return float(self._backbone.parameters / (self._backbone.parameters + own))

    def _run(self, plan: Plan) -> torch.Tensor:
        return self._backbone.logits(plan, self._backbone.forward(plan))

    def _plan(self, case: Case, slots: Sequence[int]) -> Plan:
        ids = tuple(3 + number % 90 for number in range(case.tokens))
        decode, prefill = [], []
        for number, slot in enumerate(slots):
            request = Request(f"r{number}", Job.GENERATE, ids, sampling=Sampling(max_new_tokens=8))
            sequence = forwards.running(self._backbone, request, slot)
            sequence.self_start = number * (case.tokens + 1)
            if case.work == "decode":
                sequence.computed, sequence.output = case.tokens, [5]
                decode.append(sequence)
            else:
                prefill.append(Chunk(sequence, 0, case.tokens))
        return self._planner.layout(Batch(tuple(decode), tuple(prefill))).plan

    def _parameters(self, case: Case) -> dict[str, str | int | float | bool]:
        return {
            "shape": self._scope.shape, "work": case.work, "batch": case.batch, "distinct": case.distinct,
            "kind": case.kind, "tokens": case.tokens,
        }  # fmt: skip


def _slots(case: Case) -> list[int]:
    """Rows of one delta stand together, as the planner of a server has them."""
    return sorted(number % case.distinct for number in range(case.batch))


def _left_out(scope: Scope, case: Case, why: str) -> Row:
    parameters: dict[str, str | int | float | bool] = {
        "shape": scope.shape,
        "work": case.work,
        "batch": case.batch,
        "distinct": case.distinct,
    }
    return Row(f"retention.{case.work}", "left out", {**parameters, "kind": case.kind, "tokens": case.tokens}, note=why)
