"""Every form of every kernel that a launch may choose, so that all of them can be compiled where there is no GPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaserve_kernels.gpu import lowrank
from deltaserve_kernels.gpu.board import KINDS
from deltaserve_kernels.gpu.launch import SMALLEST, TYPES, on_tensor_cores, precision
from deltaserve_kernels.gpu.tuning import LOW_RANK

_POINTERS: Mapping[torch.dtype, str] = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True, eq=False)
class Variant:
    """`types` of the arguments in their order, `fixed` what is known when it is compiled.

    `dot`: whether tensor cores are meant to do it.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    fixed: Mapping[str, Any]
    warps: int
    dot: bool
    aligned: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16 at real sizes, pointers among them."""


def variants() -> Iterator[Variant]:
    """bfloat16 rows with deltas in bfloat16 and float32, and all in float32: what servers run."""
    for rows, weights in _DTYPES:
        yield from _low_rank(rows, weights)


_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)


def _low_rank(rows: torch.dtype, weights: torch.dtype) -> Iterator[Variant]:
    numbers = {name: "i32" for name in ("width", "plane", "ranks")}
    shared = {"order": "*i64", "tiles": "*i32", "board": "*i64", "planes": "*fp32"}
    for t, r in [(size, r) for size in LOW_RANK.all() for r in sorted({SMALLEST, size.r})]:
        known = {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": lowrank.COLUMNS, "M": t.m, "R": r}
        label = f"m{t.m} r{r} {rows}/{weights}".replace("torch.", "")
        yield Variant(
            f"shrink {label}", lowrank.shrink, {"x": _POINTERS[rows], **shared, "x_stride": "i32", **numbers},
            known | {"K": t.k, "SPLIT": t.split, "HALF": on_tensor_cores(rows, weights)},
            t.warps, t.m > 1 and on_tensor_cores(rows, weights), ("x", "x_stride", "width", "planes"),
        )  # fmt: skip
        yield Variant(
            f"expand {label}", lowrank.expand, {"y": _POINTERS[rows], **shared, "y_stride": "i32", **numbers},
            known | {"N": t.n, "SPLIT": t.split, "PRECISION": precision(weights)},
            t.warps, t.m > 1 and weights != torch.float32, ("y", "y_stride", "width", "planes"),
        )  # fmt: skip
