"""All that needs a GPU, in one go: the order is that of what one most wants to know, under one budget of time."""

import time
from collections.abc import Iterator

import torch
from rich.console import Console

from bench import engines, micro, ops, screen
from bench.rows import Row


def run(device: torch.device, seed: int, seconds: float, *, tiny: bool) -> Iterator[Row]:
    """Yields rows as they come. What would begin after `seconds` is left out, and its row says so."""
    end = time.monotonic() + seconds
    yield from ops.check(device, seed)
    yield from engines.check(device, seed)
    yield Row("gpu.graphs", "not yet", {}, note="this release runs every forward eagerly")
    for case in micro.cases(device, quick=device.type == "cpu", tiny=tiny):
        if time.monotonic() < end:
            yield from micro.run(case, device, seed, lambda: None)
        else:
            yield Row(f"micro.{case.work}", "left out", case.parameters, note=f"{seconds:.0f} s were over")


def show(console: Console, rows: list[Row]) -> None:
    timed = [row for row in rows if row.seconds is not None]
    console.print(screen.checks((row for row in rows if row.seconds is None), "Right?"))
    console.print(screen.times(timed, micro.KEYS, "One forward of 8 requests ÷ transformers' own, medians"))
