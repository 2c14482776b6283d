"""One thread for work that must not hold up the event loop, with a bounded queue before it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deltaserve.errors import ResourceExhausted

T = TypeVar("T")


class Aside:
    """`most` pieces of work may wait. `begin` runs in the thread before all of them, and has run when this returns."""

    def __init__(self, name: str, most: int, begin: Callable[[], object] = lambda: None) -> None:
        self._name = name
        self._most = most
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"deltaserve-{name}")
        self._thread.submit(begin).result()

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; ResourceExhausted where the queue is full. Called from the event loop."""
        if self._waiting >= self._most:
            raise ResourceExhausted(
                f"{self._waiting} requests wait for the {self._name}; try again later",
                reason="QUEUE_FULL",
                retry_after=1.0,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Work that waits is dropped; work that runs is waited for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
