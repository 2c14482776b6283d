"""Every form of every kernel that a launch may choose, so that all of them can be compiled where there is no GPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaserve_kernels.gpu import affine, attention, block, dense, embed, lowrank, sparse
from deltaserve_kernels.gpu.board import KINDS
from deltaserve_kernels.gpu.launch import TYPES, on_tensor_cores, precision
from deltaserve_kernels.gpu.reads import ATTENTION, PART, Reads
from deltaserve_kernels.gpu.tuning import BLOCK, DENSE, LOW_RANK

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
    """bfloat16 rows with deltas in bfloat16 and float32, and all in float32: what servers run.

    What deltas add to a linear is summed in float32, whatever its rows are.
    """
    for rows, weights in _DTYPES:
        yield from _low_rank(rows, weights)
        yield from _dense(rows, weights)
    for rows in (torch.bfloat16, torch.float32):
        yield from _affine(rows)
        yield from _block(rows, torch.float32)
        yield _sparse(rows)
        yield from _embed(rows)
        yield from _attention(rows)
    yield from _turns()
    yield _pick()


_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
)


def _low_rank(rows: torch.dtype, weights: torch.dtype) -> Iterator[Variant]:
    numbers = {name: "i32" for name in ("width", "plane", "ranks")}
    shared = {"order": "*i64", "tiles": "*i32", "board": "*i64", "planes": "*fp32"}
    for t in LOW_RANK.all():
        known = {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": lowrank.COLUMNS, "M": t.m, "R": t.r}
        label = f"m{t.m} {rows}/{weights}".replace("torch.", "")
        yield Variant(
            f"shrink {label}", lowrank.shrink, {"x": _POINTERS[rows], **shared, "x_stride": "i32", **numbers},
            known | {"K": t.k, "SPLIT": t.split, "HALF": on_tensor_cores(rows, weights)},
            t.warps, t.m > 1 and on_tensor_cores(rows, weights), ("x", "x_stride", "width", "planes"),
        )  # fmt: skip
        yield Variant(
            f"expand {label}", lowrank.expand, {"y": "*fp32", **shared, "y_stride": "i32", **numbers},
            known | {"N": t.n, "SPLIT": t.split, "PRECISION": precision(weights)},
            t.warps, t.m > 1 and weights != torch.float32, ("y", "y_stride", "width", "planes"),
        )  # fmt: skip


def _dense(rows: torch.dtype, weights: torch.dtype) -> Iterator[Variant]:
    for t in DENSE.all():
        yield Variant(
            f"dense m{t.m} {rows}/{weights}".replace("torch.", ""), dense.dense,
            {"y": "*fp32", "x": _POINTERS[rows], "order": "*i64", "tiles": "*i32", "board": "*i64",
             "y_stride": "i32", "x_stride": "i32", "width": "i32"},
            {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": dense.COLUMNS, "M": t.m, "N": t.n, "K": t.k,
             "HALF": on_tensor_cores(rows, weights)},
            t.warps, t.m > 1 and on_tensor_cores(rows, weights), ("y", "x", "y_stride", "x_stride", "width"),
        )  # fmt: skip


def _affine(rows: torch.dtype) -> Iterator[Variant]:
    sides = [("in", affine.SCALE, 0)] + ([("out", affine.SCALE, affine.SHIFT)] if rows == torch.float32 else [])
    for side, scale, shift in sides:
        yield Variant(
            f"affine {side} {rows}".replace("torch.", ""), affine.affine,
            {"x": _POINTERS[rows], "slots": "*i32", "board": "*i64", "stride": "i32", "width": "i32"},
            {"COLUMNS": affine.COLUMNS, "SCALE": scale, "SHIFT": shift, "N": affine.N},
            affine.WARPS, False, ("x", "stride", "width"),
        )  # fmt: skip


def _block(rows: torch.dtype, weights: torch.dtype) -> Iterator[Variant]:
    for t in BLOCK.all():
        yield Variant(
            f"block m{t.m} {rows}/{weights}".replace("torch.", ""), block.block,
            {"x": _POINTERS[rows], "out": _POINTERS[rows], "order": "*i64", "tiles": "*i32", "board": "*i64",
             "x_stride": "i32", "out_stride": "i32", "width": "i32"},
            {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": block.COLUMNS, "M": t.m, "N": t.n,
             "PRECISION": precision(weights)},
            t.warps, False, ("x", "out", "x_stride", "out_stride", "width"),
        )  # fmt: skip


def _sparse(rows: torch.dtype) -> Variant:
    return Variant(
        f"sparse {rows}".replace("torch.", ""), sparse.sparse,
        {"y": "*fp32", "x": _POINTERS[rows], "order": "*i64", "tiles": "*i32", "board": "*i64",
         "y_stride": "i32", "x_stride": "i32", "width": "i32"},
        {"COLUMNS": sparse.COLUMNS, "M": sparse.M, "N": sparse.N},
        sparse.WARPS, False, ("y", "x", "y_stride", "x_stride", "width"),
    )  # fmt: skip


def _embed(rows: torch.dtype) -> Iterator[Variant]:
    yield Variant(
        f"gather {rows}".replace("torch.", ""), embed.gather,
        {"out": _POINTERS[rows], "ids": "*i64", "slots": "*i32", "base": _POINTERS[rows], "whole": "*i64",
         "own": "*i64", "out_stride": "i32", "base_stride": "i32", "width": "i32", "based": "i32", "factor": "fp32"},
        {"COLUMNS": embed.COLUMNS, "N": embed.N},
        embed.WARPS, False, ("out", "base", "out_stride", "base_stride", "width"),
    )  # fmt: skip


def _pick() -> Variant:
    return Variant(
        "pick", embed.pick,
        {"ids": "*i64", "order": "*i64", "slots": "*i32", "board": "*i64", "planes": "*fp32", "ranks": "i32"},
        {"COLUMNS": lowrank.COLUMNS, "R": embed.R}, 1, False, ("planes",),
    )  # fmt: skip


def _turns() -> Iterator[Variant]:
    for t in LOW_RANK.all():
        yield Variant(
            f"turn m{t.m}", lowrank.turn,
            {"tiles": "*i32", "board": "*i64", "planes": "*fp32", "turned": "*fp32", "plane": "i32", "ranks": "i32"},
            {"COLUMNS": lowrank.COLUMNS, "M": t.m, "R": t.r, "SPLIT": t.split}, t.warps, False, ("planes", "turned"),
        )  # fmt: skip


_BIASED = (64, 128)
"""Widths of heads of the models that have a relative bias."""


def _attention(rows: torch.dtype) -> Iterator[Variant]:
    fp32 = rows == torch.float32
    for width in ATTENTION.fp32:
        for biased in (False, True)[: 1 + (width in _BIASED)]:
            for t in dict.fromkeys(ATTENTION.choose(each, width, fp32, biased) for each in (1, float("inf"))):
                yield _read(rows, width, t, biased)
    yield Variant(
        f"join {rows}".replace("torch.", ""), attention.join,
        {"out": _POINTERS[rows], "tiles": "*i32", "partials": "*fp32", "sums": "*fp32", "heads": "i32", "group": "i32",
         "width": "i32"},
        {"PART": PART, **attention.JOINED}, 4, False, ("out", "partials", "width"),
    )  # fmt: skip


def _read(rows: torch.dtype, width: int, t: Reads, biased: bool) -> Variant:
    given = ("q", "k", "v")
    strides = tuple(f"{name}_{which}" for name in given for which in ("row", "head"))
    numbers = ("heads", "group", "behind", "ahead", "prefixed", "furthest")
    types = {
        **{name: _POINTERS[rows] for name in (*given, "out")}, "tiles": "*i32", "board": "*i64",
        **{name: "*fp32" for name in ("bias", "partials", "sums")}, **{name: "i32" for name in (*strides, *numbers)},
        "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip
    known = {"WIDTH": width, "D": width, "C": t.c, "M": t.m, "N": t.n, "PART": PART, "BIAS": biased, "ALIGNED": True}
    label = f"read d{width} m{t.m} n{t.n} {rows}{' biased' if biased else ''}".replace("torch.", "")
    half = on_tensor_cores(rows, rows)
    return Variant(
        label, attention.read, types, known | {"HALF": half}, t.warps, half,
        (*given, "out", "partials", "sums", *strides),
    )  # fmt: skip
