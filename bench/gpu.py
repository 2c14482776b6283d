"""All that needs a GPU, in one go: the order is that of what one most wants to know, under one budget of time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console

from bench import engines, floors, micro, ops, retention, screen
from bench.rows import Row
from deltaserve_kernels.dispatch import Implementation, forced


@dataclass(frozen=True)
class Part:
    """`rows(end)` yields as they come and begins nothing after `end`; `share`: of the whole time, at most."""

    name: str
    share: float
    rows: Callable[[float], Iterator[Row]]


def run(device: torch.device, seed: int, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yields rows as they come. What would begin after its part's time is left out, and a row says so.

    Time that a part leaves is the next ones'. On a CPU all kernels run in Triton's interpreter.
    """
    begin, shares = time.monotonic(), 0.0
    for part in _parts(device, seed, tiny=tiny):
        shares += part.share
        end = begin + seconds * shares
        if time.monotonic() >= end:
            yield Row(part.name, "left out", {}, note=f"{seconds * shares:.0f} s were over")
            continue
        yield from part.rows(end)


def _parts(device: torch.device, seed: int, *, tiny: bool) -> tuple[Part, ...]:
    return (
        Part("gpu.op", 0.25, lambda end: _until(end, ops.check(device, seed, tiny=tiny))),
        Part("gpu.engine", 0.15, lambda end: _until(end, engines.check(device, seed))),
        Part("gpu.graphs", 0.0, lambda _: iter((Row("gpu.graphs", "not yet", {}, note=_EAGER),))),
        Part("gpu.primitive", 0.1, lambda end: _until(end, _on_kernels(floors.measure(device, tiny=tiny)))),
        Part("retention", 0.35, lambda end: _on_kernels(retention.measure(device, end, tiny=tiny))),
        Part("micro", 0.15, lambda end: _micro(device, seed, end, tiny=tiny)),
    )


_EAGER = "this release runs every forward eagerly"


def _until(end: float, rows: Iterator[Row]) -> Iterator[Row]:
    """Takes one after the other; each is bounded by itself."""
    for row in rows:
        yield row
        if time.monotonic() >= end:
            yield Row(row.name, "left out", {}, note="the rest: its time was over")
            return


def _on_kernels(rows: Iterator[Row]) -> Iterator[Row]:
    """On the kernels' path, on a CPU too, which would take its own otherwise."""
    while True:
        with forced(Implementation.TRITON):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _micro(device: torch.device, seed: int, end: float, *, tiny: bool) -> Iterator[Row]:
    for case in micro.cases(device, quick=device.type == "cpu", tiny=tiny):
        if time.monotonic() < end:
            yield from micro.run(case, device, seed, lambda: None)
        else:
            yield Row(f"micro.{case.work}", "left out", case.parameters, note="its time was over")


def show(console: Console, rows: list[Row]) -> None:
    """Checks, then times; what is kept of the bare backbone's speed last."""

    def of(*names: str) -> list[Row]:
        return [row for row in rows if row.seconds is not None and row.name.startswith(names)]

    untimed = [row for row in rows if row.seconds is None]
    console.print(screen.checks((row for row in untimed if row.outcome != "right"), "Not right, or not looked at"))
    right = [row for row in untimed if row.outcome == "right"]
    console.print(f"{len(right)} checks are right")
    title = "A primitive at one site: its time, and that over the least that the chip's memory and arithmetic allow"
    console.print(screen.times(of("gpu.primitive"), ("work", "primitive", "dtype"), title))
    console.print(screen.times(of("micro."), micro.KEYS, "One forward of 8 requests ÷ transformers' own, medians"))
    console.print(screen.kept(of("retention."), retention.KEYS, "What is kept of the bare backbone's speed, medians"))
