"""Deltas on their way in and out of service. What was begun goes on when its caller goes away."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from deltaserve.catalog.catalog import Catalog
from deltaserve.catalog.reference import Reference
from deltaserve.catalog.version import Card, Source, Version
from deltaserve.deltas.delta import Delta
from deltaserve.engine.loop import Engine
from deltaserve.errors import AlreadyExists, DeltaserveError, FailedPrecondition, Internal, Unavailable
from deltaserve.metrics import Metrics
from deltaserve.service.aside import Aside

log = logging.getLogger(__name__)

T = TypeVar("T")


class Loading:
    """`content_hash` and `read` are run in the reader's thread. Called from the event loop.

    Loads of one name follow each other. A version's way out: drained (no lease left), retired (its memory given back),
    dropped.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        content_hash: Callable[[Path], str],
        read: Callable[[Source], Delta],
        reading: Aside,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._hash = content_hash
        self._read = read
        self._reading = reading
        self._metrics = metrics
        self._names: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: defaultdict[str, int] = defaultdict(int)
        self._leaving: dict[int, asyncio.Task[int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def load(self, name: str, find: Callable[[], Source], replace: bool) -> Version:
        """The version that is in service when this returns; it is resident. `find` runs in the reader's thread.

        Raises what `find` raises, BadCheckpoint, FailedPrecondition, AlreadyExists, ResourceExhausted, Unavailable.
        """
        if self._closed:
            raise Unavailable("the server is shutting down; load this delta into another one")
        return await asyncio.shield(self._task(self._load(name, find, replace), f"load {name}"))

    def unload(self, reference: Reference) -> Sequence[tuple[Version, "asyncio.Task[int]"]]:
        """Versions that take no new requests from here on; each task ends with the bytes that were given back.

        Tasks must be awaited shielded. Raises NotFound.
        """
        return [(version, self._leave(version)) for version in self._catalog.withdraw(reference)]

    async def close(self, seconds: float) -> None:
        """No new loads; those that run get `seconds`."""
        self._closed = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)

    async def _load(self, name: str, find: Callable[[], Source], replace: bool) -> Version:
        started = time.monotonic()
        outcome = "INTERNAL"
        try:
            with self._name(name) as turn:
                async with turn:
                    version, loaded = await self._loaded(name, find, replace)
            outcome = "ok"
        except DeltaserveError as error:
            outcome = error.status
            raise
        finally:
            if outcome != "ok":
                self._metrics.load(outcome, None)
        if loaded:
            self._metrics.load("ok", time.monotonic() - started)
        return version

    async def _loaded(self, name: str, find: Callable[[], Source], replace: bool) -> tuple[Version, bool]:
        """The version, and whether anything was loaded for it."""
        source = await self._reading.run(find)
        content = await self._reading.run(lambda: self._hash(source.folder))
        current = self._catalog.current(name)
        if current is not None and content == current.content_hash and _same(source, current):
            if current.key in self._engine.stats().resident:
                return current, False
            delta = await self._reading.run(lambda: self._catalog.fetch(current.key))
            await _result(self._engine.publish(current.key, delta, current.label))
            return current, True
        if current is not None and not replace:
            told = "another task, labels, problem type or task id"
            what = "other content" if content != current.content_hash else told
            raise AlreadyExists(
                f"{current.label} has {what}, from {current.source.shown}; `replace` makes this the next version",
                metadata={"delta": current.label, "has": current.content_hash, "given": content},
            )
        return await self._made(name, source, content), True

    async def _made(self, name: str, source: Source, content: str) -> Version:
        version = self._catalog.begin(name, source, content)
        try:
            delta = await self._reading.run(lambda: self._read(source))
            if delta.provenance.content_hash != content:
                raise FailedPrecondition(f"{source.shown} changed while it was read; load it again")
            self._catalog.describe(version.key, Card.of(delta))
            size = await _result(self._engine.publish(version.key, delta, version.label))
        except BaseException:
            self._catalog.abandon(version.key)
            raise
        shared = self._engine.shared_bytes(delta)
        before = self._catalog.admit(version.key, size, shared)
        if before is not None:
            self._leave(before)
        made = self._catalog.get(version.key)
        # It may have been unloaded by now, but not dropped: nothing was awaited since it was admitted.
        assert made is not None
        log.info("%s is in service: %s, %d bytes and %d shared", made.label, ", ".join(made.card.kinds), size, shared)
        for warning in made.card.warnings:
            log.warning("%s: %s", made.label, warning)
        return made

    def _leave(self, version: Version) -> "asyncio.Task[int]":
        """The task that gives a draining version's memory back; there is one for each."""
        task = self._leaving.get(version.key)
        if task is None:
            task = self._leaving[version.key] = self._task(self._left(version), f"unload {version.label}")
        return task

    async def _left(self, version: Version) -> int:
        await _result(self._catalog.drained(version.key))
        leaving = [version.key, *(each.key for each in self._catalog.combinations.leaving(version.key))]
        freed = sum([await _result(self._engine.retire(key)) for key in leaving])
        self._catalog.drop(version.key)
        del self._leaving[version.key]
        log.info("%s is out of service: %d bytes given back", version.label, freed)
        return freed

    def _task(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        """Notes a failure that nobody may be waiting for."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            told = isinstance(error, DeltaserveError) and not isinstance(error, Internal)
            log.info("%s: %s", task.get_name(), error, exc_info=None if told else error)

    @contextmanager
    def _name(self, name: str) -> Iterator[asyncio.Lock]:
        """A name's lock, which exists as long as somebody holds it or waits for it."""
        self._users[name] += 1
        try:
            yield self._names[name]
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._names[name]


def _same(source: Source, current: Version) -> bool:
    """Whether what the operator says now is what was said then, or what the checkpoint says."""
    before, card = current.source, current.card
    return (
        source.task in (before.task, card.task)
        and source.labels in (before.labels, card.labels)
        and source.problem_type in (before.problem_type, card.problem_type)
        and source.task_id in (before.task_id, card.task_id)
    )


async def _result(future: "Future[T]") -> T:
    """A result from another thread; a caller who goes away must not cancel it, for its maker means to set it."""
    return await asyncio.shield(asyncio.wrap_future(future))
