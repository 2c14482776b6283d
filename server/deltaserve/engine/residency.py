"""Which deltas are on the device: loads them beside running work, evicts, retires. Runs on the engine's thread.

A loader thread reads, lowers and copies; it never touches a table. Whoever waits for a delta waits alone.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.errors import DeltaserveError, FailedPrecondition, Internal, ResourceExhausted, Unavailable
from deltaserve.pool.pool import Pool, Resident

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that a delta waits for room while later requests pass and keep others pinned."""


@dataclass(eq=False)
class _Load:
    """A load under way. `askers` get the device bytes; `demanded`: requests wait for it, so it may wait for room.

    `blocked_since`: when it first found the pool full of deltas in use.
    """

    key: int
    label: str
    delta: Delta | None = None
    askers: list[Future[int]] = field(default_factory=list)
    demanded: bool = False
    copying: bool = False
    blocked_since: float | None = None


class Residency:
    """`fetch(key)` reads an evicted delta again, on the loader's thread; `post` runs a callable on the engine's."""

    def __init__(
        self,
        backbone: Backbone,
        pool: Pool,
        fetch: Callable[[int], Delta],
        post: Callable[[Callable[[], None]], None],
        failed: Callable[[int, DeltaserveError], None],
    ) -> None:
        self._backbone = backbone
        self._pool = pool
        self._fetch = fetch
        self._post = post
        self._failed = failed
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="deltaserve-loader")
        self._loads: dict[int, _Load] = {}
        self._uses: dict[int, int] = {}
        self._retiring: dict[int, list[Future[int]]] = {}

    @property
    def loading(self) -> frozenset[int]:
        return frozenset(self._loads)

    def publish(self, key: int, label: str, delta: Delta, asker: Future[int]) -> None:
        """Makes a delta resident for an operator, who is told at once where there is no room for it."""
        resident = self._pool.get(key)
        if resident is not None:
            asker.set_result(resident.nbytes)
            return
        load = self._loads.setdefault(key, _Load(key, label))
        load.delta = load.delta or delta
        load.askers.append(asker)
        self._place(load)

    def pin(self, key: int, label: str) -> Resident | None:
        """The pinned delta, or None while it is being loaded; `failed` tells if that came to nothing."""
        resident = self._pool.get(key)
        if resident is not None:
            resident.pins += 1
            resident.promised = False
            self._pool.touch(key)
            return resident
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load(key, label, demanded=True)
            self._read(load)
        load.demanded = True
        if load.delta is not None and not load.copying:
            self._place(load)
        return None

    def starves(self, key: int) -> bool:
        """Whether a delta has waited so long for room that nobody may take a pin before it gets some."""
        load = self._loads.get(key)
        since = None if load is None or load.copying else load.blocked_since
        return since is not None and time.monotonic() - since > PATIENCE

    def unpin(self, resident: Resident) -> None:
        assert resident.pins > 0
        resident.pins -= 1

    def use(self, key: int, change: int) -> None:
        """Counts the requests, waiting or running, that name a delta; a retiring one is freed at zero."""
        self._uses[key] = self._uses.get(key, 0) + change
        assert self._uses[key] >= 0
        if self._uses[key] == 0:
            del self._uses[key]
            resident = self._pool.get(key)
            if resident is not None:
                resident.promised = False
            self._free_if_unused(key)

    def retire(self, key: int, asker: Future[int]) -> None:
        """Frees a delta when the last request that names it has ended."""
        self._retiring.setdefault(key, []).append(asker)
        self._free_if_unused(key)

    def stop(self) -> None:
        """Ends the loader; loads under way fail, and so does a retirement that still waits for requests."""
        for load in list(self._loads.values()):
            self._fail(load, Unavailable("the server stopped while this delta was loading"))
        for askers in self._retiring.values():
            for asker in askers:
                asker.set_exception(Unavailable("the server stopped while requests still named this delta"))
        self._retiring.clear()
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _read(self, load: _Load) -> None:
        def read() -> None:
            try:
                delta = self._fetch(load.key)
            except Exception as error:
                self._post(lambda error=error: self._fail(load, _typed(error, load.label)))  # type: ignore[misc]
            else:
                self._post(lambda: self._have(load, delta))

        self._loader.submit(read)

    def _have(self, load: _Load, delta: Delta) -> None:
        if self._loads.get(load.key) is not load:
            return
        load.delta = delta
        self._place(load)

    def _place(self, load: _Load) -> None:
        """Finds room, evicting deltas that nobody uses, least recently used first; then copies."""
        delta = load.delta
        assert delta is not None
        if load.copying:
            return
        alone = self._pool.size(delta) + self._pool.shared(delta)
        if alone > self._pool.capacity:
            self._fail(load, _too_large(load.label, alone, self._pool.capacity))
            return
        place = self._pool.reserve(load.key, load.label, delta)
        while place is None:
            victim = self._pool.victim(delta, promised=self.starves(load.key))
            if victim is None:
                if load.demanded:
                    load.blocked_since = load.blocked_since or time.monotonic()
                    return  # the scheduler asks again when something was unpinned
                self._fail(load, _full(load.label, self._pool))
                return
            self._drop(victim)
            place = self._pool.reserve(load.key, load.label, delta)
        load.copying = True
        self._loader.submit(self._copy, load, place, delta)

    def _copy(self, load: _Load, place: Resident, delta: Delta) -> None:
        try:
            with torch.inference_mode():
                copied = self._pool.copy(place, delta)
        except Exception as error:
            typed = _typed(error, load.label)
            self._post(lambda: self._give_up(load, place, typed))
        else:
            self._post(lambda: self._publish(load, place, copied))

    def _give_up(self, load: _Load, place: Resident, error: DeltaserveError) -> None:
        self._pool.release(place)
        if self._loads.get(load.key) is load:
            self._fail(load, error)

    def _publish(self, load: _Load, place: Resident, copied: Delta) -> None:
        if self._loads.get(load.key) is not load:  # it was failed when the engine stopped
            self._pool.release(place)
            return
        try:
            with torch.inference_mode():
                self._backbone.install(place.slot, copied)
        except Exception as error:  # one bad delta is no reason to stop the others
            with torch.inference_mode():
                self._backbone.remove(place.slot, copied)
            self._pool.release(place)
            self._fail(load, _typed(error, load.label))
            return
        place.promised = load.demanded and bool(self._uses.get(load.key))
        self._pool.publish(place, copied)
        del self._loads[load.key]
        for asker in load.askers:
            asker.set_result(place.nbytes)
        log.info("%s is resident: slot %d, %d bytes", load.label, place.slot, place.nbytes)
        self._free_if_unused(load.key)

    def _fail(self, load: _Load, error: DeltaserveError) -> None:
        self._loads.pop(load.key, None)
        for asker in load.askers:
            asker.set_exception(error)
        # Posted: this may run inside the scheduler's walk over those that wait.
        self._post(lambda: self._failed(load.key, error))
        self._free_if_unused(load.key)

    def _drop(self, resident: Resident) -> int:
        assert resident.delta is not None
        with torch.inference_mode():
            self._backbone.remove(resident.slot, resident.delta)
        return self._pool.release(resident)

    def _free_if_unused(self, key: int) -> None:
        if key not in self._retiring or self._uses.get(key) or key in self._loads:
            return
        resident = self._pool.get(key)
        freed = 0 if resident is None else self._drop(resident)
        for asker in self._retiring.pop(key):
            asker.set_result(freed)

    def forget(self, keys: Iterable[int]) -> None:
        """Drops loads that only requests wanted and that no request names any more."""
        for key in keys:
            load = self._loads.get(key)
            if load is not None and not load.askers and not load.copying and not self._uses.get(key):
                del self._loads[key]
                self._free_if_unused(key)


def _typed(error: Exception, label: str) -> DeltaserveError:
    if isinstance(error, DeltaserveError):
        return error
    log.error("loading %s failed", label, exc_info=error)
    return Internal(f"{label}: loading failed; the server's log says why", reason="LOAD_FAILED")


def _too_large(label: str, size: int, capacity: int) -> DeltaserveError:
    return FailedPrecondition(
        f"{label} takes {size} bytes and the pool holds {capacity}; start the server with a larger --pool-bytes",
        reason="DELTA_TOO_LARGE",
        metadata={"bytes": str(size), "capacity": str(capacity)},
    )


def _full(label: str, pool: Pool) -> DeltaserveError:
    return ResourceExhausted(
        f"{label}: the pool ({pool.used} of {pool.capacity} bytes) is full of deltas in use; try again later or start "
        "the server with a larger --pool-bytes",
        reason="POOL_FULL",
        retry_after=1.0,
    )
