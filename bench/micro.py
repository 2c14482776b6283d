"""What the wrapped modules cost per forward, against transformers' own forward of the same rows."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import agreement, deltas, forwards, shapes
from bench.clock import Variant, interleaved, ratios
from bench.quiet import Others
from bench.rows import Row, Spread
from deltaserve.backbone.load import DTYPES, native_bfloat16
from deltaserve.deltas.delta import Delta

KEYS = ("shape", "work", "tokens", "dtype", "variant")
"""The parameters that tell the rows apart."""
REQUESTS, RANK = 8, 8
PLAIN, PEFT = "transformers", "PEFT mixed batch, 8 LoRA"
EMPTY, PLANNED = "none resident", "none resident, plan included"
BARE, MIXED = "8 LoRA resident, rows bare", "8 LoRA, one a request"
VARIANTS = 6
REFERENCES = {EMPTY: PLAIN, PLANNED: PLAIN, BARE: PLAIN, MIXED: PEFT}
"""What a variant of ours has to agree with."""


@dataclass(frozen=True)
class Case:
    """`tokens`: of each input (encode), or in each cache (decode)."""

    shape: str
    work: str
    tokens: int
    dtype: str
    rounds: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.work} {self.tokens}, {self.dtype}"

    @property
    def parameters(self) -> dict[str, str | int | float | bool]:
        rows = REQUESTS * (self.tokens if self.work == "encode" else 1)
        return {
            "shape": self.shape, "work": self.work, "dtype": self.dtype, "requests": REQUESTS, "tokens": self.tokens,
            "rows": rows, "rank": RANK,
        }  # fmt: skip


def cases(device: torch.device, *, quick: bool = False, tiny: bool = False) -> tuple[Case, ...]:
    """bfloat16 only where the device multiplies it itself. `tiny` is for trying the bench out, not for figures."""
    dtypes = ["float32"] + ["bfloat16"] * (device.type == "cuda" or native_bfloat16())
    bert, llama = ("tiny-bert", "tiny-llama") if tiny else ("bert-base", "llama-24")
    few = 3 if tiny else 5 if quick else None
    return tuple(
        Case(shape, work, tokens, dtype, few or rounds)
        for shape, work, tokens, rounds in (
            (bert, "encode", 1, 40),
            (bert, "encode", 64, 15),
            (llama, "decode", 64, 30),
        )
        for dtype in dtypes
    )


def run(case: Case, device: torch.device, seed: int, advance: Callable[[], object]) -> list[Row]:
    """Measures one case: a row for each variant. Their results are compared before they are timed."""
    dtype = DTYPES[case.dtype]
    pair = shapes.twins(case.shape, dtype, device, seed)
    make = forwards.encode if case.work == "encode" else forwards.decode
    forward = make(pair, REQUESTS, case.tokens, seed)
    loras = [deltas.on(deltas.lora(pair.ours.spec, RANK, seed + slot), device) for slot in range(REQUESTS)]
    plans = {"bare": forward.plan([-1] * REQUESTS), "mixed": forward.plan(range(REQUESTS))}
    pool = _Installed(pair, loras)

    held, names = _in_peft(case, pair, loras), [f"d{slot}" for slot in range(REQUESTS)]
    variants = [
        Variant(PLAIN, lambda: forward.plain(pair.plain), forward.restore),
        Variant(EMPTY, lambda: forward.ours(plans["bare"]), pool.empty),
        Variant(PLANNED, lambda: forward.ours(forward.plan([-1] * REQUESTS)), pool.empty),
        Variant(BARE, lambda: forward.ours(plans["bare"]), pool.fill),
        Variant(MIXED, lambda: forward.ours(plans["mixed"]), pool.fill),
        Variant(PEFT, lambda: forward.plain(held, adapter_names=names), forward.restore),
    ]
    assert len(variants) == VARIANTS
    truth = {
        PLAIN: lambda: forward.plain(copy.deepcopy(pair.plain).float()),
        PEFT: lambda: forward.plain(copy.deepcopy(held).float(), adapter_names=names),
    }
    agreed = agreement.of(variants, REFERENCES, truth if dtype is not torch.float32 else None)
    with Others() as others:
        seconds = interleaved(variants, case.rounds, device, seed, advance)
    return [_row(case, name, seconds, agreed.get(name), others.cores) for name in seconds]


def _row(
    case: Case, name: str, seconds: Mapping[str, list[float]], agreed: agreement.Agreement | None, others: float
) -> Row:
    return Row(
        name=f"micro.{case.work}",
        outcome="measured" if agreed is None or agreed.right else "wrong",
        parameters={**case.parameters, "variant": name},
        seconds=Spread.of(seconds[name]),
        ratio=Spread.of(ratios(seconds[name], seconds[PLAIN])),
        against=PLAIN,
        error_ratio=None if agreed is None else agreed.error_ratio,
        limit=None if agreed is None else agreed.limit,
        others=others,
    )


class _Installed:
    """Puts the deltas into the backbone's tables, and takes them out."""

    def __init__(self, pair: shapes.Twins, loras: Sequence[Delta]) -> None:
        self._backbone, self._loras, self._full = pair.ours, loras, False

    def fill(self) -> None:
        if not self._full:
            for slot, delta in enumerate(self._loras):
                self._backbone.install(slot, delta)
        self._full = True

    def empty(self) -> None:
        if self._full:
            for slot, delta in enumerate(self._loras):
                self._backbone.remove(slot, delta)
        self._full = False


def _in_peft(case: Case, pair: shapes.Twins, loras: Sequence[Delta]) -> Any:
    """A third model of the same weights, with PEFT's tuners: its own way to give each row its own LoRA."""
    family = pair.ours.family
    model = shapes.sharing(case.shape, pair.ours)
    return deltas.in_peft(model, f"{family.prefix}." if family.base_only else "", loras)
