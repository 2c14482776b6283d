"""Who else is busy on this machine: numbers that were taken beside others say so."""

import os
import time
from types import TracebackType
from typing import Self

import psutil

QUIET = 0.1
"""Cores of others below which a machine is quiet."""
_LOOK = 5.0


class Others:
    """Around a measurement: `cores` is how many, on average, processes that are not this one kept busy."""

    cores = 0.0

    def __enter__(self) -> Self:
        self._begin = _seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wall, everybody, own = (now - then for now, then in zip(_seconds(), self._begin, strict=True))
        self.cores = max(0.0, (everybody - own) / wall)


def wait_for_quiet(seconds: float) -> None:
    """Returns when others are idle for a moment, or when `seconds` are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with Others() as others:
            time.sleep(_LOOK)
        if others.cores < QUIET:
            return


def _seconds() -> tuple[float, float, float]:
    """The clock's, those of all cores that were not idle, and this process's own."""
    cpu = psutil.cpu_times()
    own = os.times()
    return time.monotonic(), sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0), own.user + own.system
