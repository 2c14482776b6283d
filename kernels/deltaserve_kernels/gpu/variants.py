"""Every form of every kernel that a launch may choose, so that all of them can be compiled where there is no GPU."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deltaserve_kernels.fusion import MEMBERS
from deltaserve_kernels.gpu import affine, attention, block, dense, embed, fusion, lowrank, ownnorm, sparse
from deltaserve_kernels.gpu.board import KINDS
from deltaserve_kernels.gpu.launch import TYPES, on_tensor_cores, precision
from deltaserve_kernels.gpu.reads import ATTENTION, PART, Reads
from deltaserve_kernels.gpu.tuning import ACTIVATED, BLOCK, DENSE, LOW_RANK

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


def variants(architecture: str | None = None) -> Iterator[Variant]:
    """Of one chip, or of all that have tiles of their own: bfloat16 and float32 rows, with
    deltas in bfloat16 and float32, which is what servers run.

    What deltas add to a linear is summed in float32, whatever its rows are, and adapters read those sums.
    """
    for rows, weights in itertools.product(_DTYPES, _DTYPES):
        yield from _shrink(rows, weights, architecture)
        yield from _dense(rows, weights, architecture)
    for weights in _DTYPES:
        yield from _expand(weights, architecture)
    for rows in (torch.bfloat16, torch.float32):
        yield from _affine(rows)
        yield from _block(rows, torch.float32, architecture)
        yield _sparse(rows)
        yield from _embed(rows)
        yield from _attention(rows)
    yield from _turns(architecture)
    yield _pick()
    yield _norm()
    yield _fusion()


_DTYPES = (torch.bfloat16, torch.float32)
_NUMBERS = {name: "i32" for name in ("width", "plane", "ranks")}
_SHARED = {"order": "*i64", "tiles": "*i32", "board": "*i64", "planes": "*fp32"}


def _products(rows: torch.dtype, weights: torch.dtype) -> Mapping[str, Any]:
    """How rows meet weights."""
    return {"HALF": on_tensor_cores(rows, weights), "PRECISION": precision(weights)}


def _shrink(rows: torch.dtype, weights: torch.dtype, architecture: str | None) -> Iterator[Variant]:
    for t in LOW_RANK.all(architecture):
        yield Variant(
            f"shrink m{t.m} {rows}/{weights}".replace("torch.", ""), lowrank.shrink,
            {"x": _POINTERS[rows], **_SHARED, "x_stride": "i32", **_NUMBERS},
            {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": lowrank.COLUMNS, "M": t.m, "R": t.r, "K": t.k,
             "SPLIT": t.split, **_products(rows, weights)},
            t.warps, t.m > 1 and weights != torch.float32, ("x", "x_stride", "width", "planes"),
        )  # fmt: skip


def _expand(weights: torch.dtype, architecture: str | None) -> Iterator[Variant]:
    for t, bottleneck in ((t, table is ACTIVATED) for table in (LOW_RANK, ACTIVATED) for t in table.all(architecture)):
        yield Variant(
            f"expand{' bottleneck' if bottleneck else ''} m{t.m} {weights}".replace("torch.", ""), lowrank.expand,
            {"y": "*fp32", **_SHARED, "gates": "*fp32", "y_stride": "i32", **_NUMBERS},
            {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": lowrank.COLUMNS, "M": t.m, "N": t.n, "R": t.r,
             "SPLIT": t.split, "PRECISION": precision(weights), "BOTTLENECK": bottleneck},
            t.warps, t.m > 1 and weights != torch.float32, ("y", "y_stride", "width", "planes"),
        )  # fmt: skip


def _dense(rows: torch.dtype, weights: torch.dtype, architecture: str | None) -> Iterator[Variant]:
    for t in DENSE.all(architecture):
        yield Variant(
            f"dense m{t.m} {rows}/{weights}".replace("torch.", ""), dense.dense,
            {"y": "*fp32", "x": _POINTERS[rows], "order": "*i64", "tiles": "*i32", "board": "*i64",
             "y_stride": "i32", "x_stride": "i32", "width": "i32"},
            {"KIND": KINDS[weights], "TYPE": TYPES[weights], "COLUMNS": dense.COLUMNS, "M": t.m, "N": t.n, "K": t.k,
             **_products(rows, weights)},
            t.warps, t.m > 1 and weights != torch.float32, ("y", "x", "y_stride", "x_stride", "width"),
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


def _block(rows: torch.dtype, weights: torch.dtype, architecture: str | None) -> Iterator[Variant]:
    for t in BLOCK.all(architecture):
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


def _turns(architecture: str | None) -> Iterator[Variant]:
    for t in LOW_RANK.all(architecture):
        yield Variant(
            f"turn m{t.m}", lowrank.turn,
            {"tiles": "*i32", "board": "*i64", "planes": "*fp32", "turned": "*fp32", "plane": "i32", "ranks": "i32"},
            {"COLUMNS": lowrank.COLUMNS, "M": t.m, "R": t.r, "SPLIT": t.split}, t.warps, False, ("planes", "turned"),
        )  # fmt: skip


def _norm() -> Variant:
    return Variant(
        "norm", ownnorm.norm, {"y": "*fp32", "slots": "*i32", "board": "*i64", "stride": "i32", "width": "i32"},
        {"COLUMNS": ownnorm.COLUMNS, "N": ownnorm.N}, ownnorm.WARPS, False, ("y", "stride", "width"),
    )  # fmt: skip


def _fusion() -> Variant:
    rows = ("y", "c", "asked", "keys", "members")
    numbers = ("y_stride", "asked_stride", "width", "most")
    return Variant(
        "fusion", fusion.attend,
        {**{name: "*fp32" for name in rows}, "slots": "*i32", "board": "*i64", **{name: "i32" for name in numbers}},
        {"COLUMNS": fusion.COLUMNS, "MEMBERS": MEMBERS, "N": fusion.N}, fusion.WARPS, False, (*rows, *numbers[:3]),
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
