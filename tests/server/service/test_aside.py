"""The thread beside the event loop: one at a time, a bounded queue, errors as they were."""

import asyncio
import threading

import pytest

from deltaserve.errors import NotFound, ResourceExhausted
from deltaserve.service.aside import Aside

SECONDS = 10


async def test_work_runs_in_one_thread_and_in_order() -> None:
    begun: list[str] = []
    aside = Aside("test", 100, lambda: begun.append(threading.current_thread().name))
    assert begun == ["deltaserve-test_0"]
    names: list[tuple[int, str]] = []
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(
            *(aside.run(lambda i=i: names.append((i, threading.current_thread().name))) for i in range(20))
        )
    assert names == [(i, "deltaserve-test_0") for i in range(20)]
    aside.close()


async def test_the_queue_is_bounded() -> None:
    aside, gate = Aside("test", 2), threading.Event()
    async with asyncio.timeout(SECONDS):
        held = [asyncio.create_task(aside.run(lambda: gate.wait(SECONDS))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="2 requests wait for the test"):
            await aside.run(lambda: None)
        gate.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await aside.run(lambda: 7) == 7
    aside.close()


async def test_errors_and_cancelled_callers_leave_it_usable() -> None:
    aside, gate = Aside("test", 2), threading.Event()

    def fail() -> None:
        raise NotFound("nothing here")

    async with asyncio.timeout(SECONDS):
        with pytest.raises(NotFound, match="nothing here"):
            await aside.run(fail)
        gone = asyncio.create_task(aside.run(lambda: gate.wait(SECONDS)))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        gate.set()
        assert await aside.run(lambda: 7) == 7
    aside.close()
