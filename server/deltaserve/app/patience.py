"""A word now and then from long work."""

import time
from collections.abc import Callable

EVERY = 10.0
"""Seconds."""


class Patience:
    """`say(done=…, total=…)` is called where `every` seconds have passed since the beginning or the last time."""

    def __init__(self, say: Callable[..., object], every: float = EVERY) -> None:
        self._say = say
        self._every = every
        self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._say(done=done, total=total)
