"""What deltas of each kind cost per forward, and sixteen kinds in one, against the bare backbone on as many rows."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench import forwards, kinds, shapes
from bench.clock import Variant, interleaved, ratios
from bench.forwards import Forwards
from bench.quiet import Others
from bench.rows import Row, Spread
from deltaserve.backbone.load import DTYPES
from deltaserve.deltas.delta import Delta
from deltaserve.plan import Plan
from deltaserve_kernels.dense import heads
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import error_ratio

KEYS = ("shape", "work", "tokens", "dtype", "kind", "at")
"""The parameters that tell the rows apart."""
REQUESTS, DELTAS = 32, 16
TRAINED = 64
"""Tokens that a delta trains, of those that are in the inputs."""
BARE = "bare"
VARIANTS = 2
EXACT = 1e-5
MOVED = 1e-3
"""Error ratio that each delta makes at least: what does nothing costs nothing."""


@dataclass(frozen=True)
class Case:
    """`tokens`: of each input (encode), or in each cache (decode). `chosen`: the kinds of the deltas."""

    shape: str
    work: str
    tokens: int
    dtype: str
    rounds: int
    chosen: tuple[kinds.Kind, ...]

    def __str__(self) -> str:
        return f"{self.shape}, {self.work} {self.tokens}, {self.dtype}, {self.kind}"

    @property
    def kind(self) -> str:
        return self.chosen[0].name if len(self.chosen) == 1 else f"{len(self.chosen)} kinds mixed"

    @property
    def prompt(self) -> int:
        return self.chosen[0].rows

    @property
    def parameters(self) -> dict[str, str | int | float | bool]:
        each = self.prompt + self.tokens if self.work == "encode" else 1
        return {
            "shape": self.shape, "work": self.work, "dtype": self.dtype, "requests": REQUESTS, "tokens": self.tokens,
            "rows": REQUESTS * each, "deltas": DELTAS, "kind": self.kind,
            "at": self.chosen[0].at if len(self.chosen) == 1 else "",
        }  # fmt: skip


def cases(*, quick: bool = False, tiny: bool = False) -> tuple[Case, ...]:
    """`tiny` is for trying the bench out, not for figures: a few kinds."""
    bert, llama = ("tiny-bert", "tiny-llama") if tiny else ("bert-base", "llama-24")
    few = 2 if tiny else 3 if quick else None
    alone = (*(kinds.TINY if tiny else (*kinds.MIX, *kinds.ALONE)), *kinds.ADAPTERS)
    mix = kinds.TINY if tiny else kinds.MIX
    return tuple(
        Case(shape, work, tokens, "float32", few or rounds, chosen)
        for shape, work, tokens, rounds, sets in (
            (bert, "encode", 16, 3, [*((kind,) for kind in (*alone, *kinds.ENCODED)), mix]),
            (bert, "encode", 64, 3, [mix]),
            (llama, "decode", 64, 7, [*((kind,) for kind in alone), mix]),
        )
        for chosen in sets
    )


def run(case: Case, device: torch.device, seed: int, advance: Callable[[], object]) -> list[Row]:
    """Measures one case. Its result is compared with that of the reference kernels before it is timed."""
    pair = _pair(case.shape, case.dtype, device, seed)
    if case.work == "encode":
        forward = forwards.encode(pair, REQUESTS, case.tokens, seed, case.prompt)
    else:
        forward = forwards.decode(pair, REQUESTS, case.tokens, seed)
    slots = [number * DELTAS // REQUESTS for number in range(REQUESTS)]
    bare, mixed = forward.plan([-1] * REQUESTS), forward.plan(slots)
    assert mixed.tokens is not None and bare.tokens is not None
    ids = bare.tokens.ids.tolist()
    held = _deltas(case, pair, ids[:: max(1, len(ids) // TRAINED)], seed)
    answered = _Answers(forward, held, slots)
    for slot, delta in enumerate(held):
        pair.ours.install(slot, delta)
    try:
        with forced(Implementation.REFERENCE):
            right = answered(mixed)
        error = error_ratio(answered(mixed), right)
        _assert_moved(case, forward.ours(mixed), forward.ours(bare))
        variants = [Variant(BARE, lambda: forward.ours(bare)), Variant(case.kind, lambda: answered(mixed))]
        assert len(variants) == VARIANTS
        with Others() as others:
            seconds = interleaved(variants, case.rounds, device, seed, advance, warm=False)
    finally:
        for slot, delta in enumerate(held):
            pair.ours.remove(slot, delta)
    row = Row(
        name=f"kinds.{case.work}",
        outcome="measured" if error <= EXACT else "wrong",
        parameters=case.parameters,
        seconds=Spread.of(seconds[case.kind]),
        ratio=Spread.of(ratios(seconds[case.kind], seconds[BARE])),
        against=BARE,
        error_ratio=error,
        limit=EXACT,
        nbytes=_nbytes(held),
        others=others.cores,
    )
    return [row]


def _assert_moved(case: Case, ours: torch.Tensor, bare: torch.Tensor) -> None:
    """Each delta's rows, which are those of neighbours."""
    pairs = zip(ours.tensor_split(DELTAS), bare.tensor_split(DELTAS), strict=True)
    least = min(error_ratio(one, other) for one, other in pairs)
    assert least >= MOVED, f"{case}: a delta moves its rows by {least:.1e} only"


def _nbytes(held: Sequence[Delta]) -> int:
    """As in the pool: bases once."""
    bases = {key: base for delta in held for key, base in delta.bases.items()}
    return sum(delta.nbytes for delta in held) + sum(base.numel() * base.element_size() for base in bases.values())


class _Answers:
    """The forward, and heads over the first row of each request where the deltas have some."""

    def __init__(self, forward: Forwards, held: Sequence[Delta], slots: Sequence[int]) -> None:
        self._forward = forward
        self._rowmap = RowMap.of([(slot, 1) for slot in slots], torch.device("cpu"))
        self._heads = {
            slot: [(layer.weight, layer.bias, layer.activation) for layer in delta.head.layers]
            for slot, delta in enumerate(held)
            if delta.head is not None
        }

    def __call__(self, plan: Plan) -> torch.Tensor:
        rows = self._forward.ours(plan)
        if not self._heads:
            return rows
        return torch.stack(heads(rows[:: rows.shape[0] // self._rowmap.rows], self._rowmap, self._heads))


def _deltas(case: Case, pair: shapes.Twins, ids: Sequence[int], seed: int) -> list[Delta]:
    """The mix has one of each kind; in a try-out with fewer kinds, as many of each as there is room for."""
    each = DELTAS // len(case.chosen)
    made = (kinds.of_kind(kind, pair.ours, case.shape, each, ids, seed) for kind in case.chosen)
    return [delta for group in made for delta in group]


@functools.lru_cache(maxsize=1)
def _pair(shape: str, dtype: str, device: torch.device, seed: int) -> shapes.Twins:
    """One for many cases: a backbone of real size takes longer to make than to measure."""
    return shapes.twins(shape, DTYPES[dtype], device, seed)
