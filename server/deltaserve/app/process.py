"""`deltaserve serve` as a process: logs, signals, and how it ends."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from deltaserve.app import logs, ports
from deltaserve.config import Settings

if TYPE_CHECKING:
    from deltaserve.app.server import App

log = structlog.get_logger("deltaserve")

_TELL_EVERY = 10.0
_LAST_WAIT = 5.0
"""Seconds after a second signal; a forward may be running."""


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises DeltaserveError for what the operator can mend."""
    for port, flag in ((settings.grpc_port, "--grpc-port"), (settings.metrics_port, "--metrics-port")):
        ports.check(settings.host, port, flag)
    from deltaserve.app.server import App  # brings torch, which takes seconds

    logs.configure(settings)
    app = App(settings)
    return asyncio.run(_serve(app, settings))


async def _serve(app: "App", settings: Settings) -> int:
    stop = asyncio.Event()
    _on_signals(app, stop)
    try:
        summary = await app.start()
        summary.tell(logs.for_people(settings))
        await _first_of({"server": app.ended, "signal": stop.wait, "traffic": lambda: _traffic(app)})
    except BaseException:
        await app.stop(0)
        raise
    log.info("draining", seconds=settings.drain_seconds)
    await app.stop(settings.drain_seconds)
    log.info("stopped")
    return 0


async def _first_of(work: dict[str, Callable[[], Coroutine[Any, Any, Any]]]) -> None:
    """Runs named tasks until one ends, then stops all; raises what that one raised."""
    tasks = [asyncio.create_task(begin(), name=name) for name, begin in work.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    for task in done:
        task.result()


async def _traffic(app: "App") -> None:
    while True:
        await asyncio.sleep(_TELL_EVERY)
        app.tell_traffic()


def _on_signals(app: "App", stop: asyncio.Event) -> None:
    """The first signal drains, the second ends the drain."""
    loop = asyncio.get_running_loop()

    def caught(which: signal.Signals) -> None:
        log.info("signal", signal=which.name)
        if stop.is_set():
            loop.call_later(_LAST_WAIT, os._exit, 1)
            loop.run_in_executor(None, app.hurry)
        stop.set()

    for which in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(which, caught, which)
