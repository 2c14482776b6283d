"""Each primitive on a device beside the least time that its bytes and operations take there."""

import time
from collections.abc import Iterator

import torch

from bench.primitives import FULL, TINY, TINY_WORKS, WORKS, Primitive, primitives
from bench.roofline import chip_of
from bench.rows import Row, Spread

ROUNDS = 20
_CACHES = 256 << 20
"""Bytes that are written between two runs, so that none finds in a cache what the one before left there."""


def measure(device: torch.device, *, tiny: bool) -> Iterator[Row]:
    """A row for each primitive; `ratio` is its time over the least one, where the chip's figures are known."""
    chip = chip_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    works, size = (TINY_WORKS, TINY) if tiny else (WORKS, FULL)
    for work in works:
        for one in primitives(work, size, device, dtype):
            taken = seconds(one, device, 3 if tiny else ROUNDS)
            least = None if chip is None else chip.seconds(one.cost, dtype)
            yield Row(
                "gpu.primitive", "measured", {"work": work.name, "primitive": one.name, "dtype": str(dtype)[6:]},
                seconds=Spread.of(taken),
                ratio=None if least is None else Spread.of([each / least for each in taken]),
                against=None if chip is None else f"{chip.name}'s memory and arithmetic",
                nbytes=one.cost.moved,
            )  # fmt: skip


@torch.inference_mode()
def seconds(one: Primitive, device: torch.device, rounds: int) -> list[float]:
    one.run()
    if device.type != "cuda":
        found = []
        for _ in range(rounds):
            begin = time.perf_counter()
            one.run()
            found.append(time.perf_counter() - begin)
        return found
    swept = torch.empty(_CACHES, dtype=torch.uint8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin_mark, end_mark in marks:
        swept.zero_()
        begin_mark.record()
        one.run()
        end_mark.record()
    torch.cuda.synchronize(device)
    return [begin_mark.elapsed_time(end_mark) / 1e3 for begin_mark, end_mark in marks]
