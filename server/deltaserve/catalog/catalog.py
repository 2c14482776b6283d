"""Which deltas exist. In memory; may be called from any thread."""

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from deltaserve.catalog.combination import Combinations
from deltaserve.catalog.reference import Reference
from deltaserve.catalog.version import Card, Source, State, Version
from deltaserve.deltas.delta import Delta
from deltaserve.errors import DataLoss, DeltaserveError, NotFound


class Catalog:
    """`read` makes a delta of a source, on the caller's thread; it is what `fetch` uses.

    A version's life: `begin` (LOADING), `admit` (RESIDENT, and the one that new requests get), `withdraw` (DRAINING),
    `drained` when the last lease ended, `drop`. `abandon` ends a version that was never admitted. `combinations` are
    deltas made of several versions; their keys are no version's.
    """

    def __init__(self, read: Callable[[Source], Delta]) -> None:
        self._read = read
        self._lock = Lock()
        self._keys = itertools.count(1)
        self._versions: dict[int, Version] = {}
        self._current: dict[str, int] = {}
        self._last: Counter[str] = Counter()
        self._leases: Counter[int] = Counter()
        self._drained: dict[int, Future[None]] = {}
        self.combinations = Combinations(self.fetch, self._keys)

    def resolve(self, reference: Reference) -> Version:
        """The version that a new request gets. Raises NotFound with the nearest names."""
        with self._lock:
            return self._resolve(reference)

    @contextmanager
    def lease(self, reference: Reference) -> Iterator[Version]:
        """`resolve`, and until the end of the block the version's memory stays its own. Raises NotFound."""
        with self._lock:
            version = self._resolve(reference)
            self._leases[version.key] += 1
        try:
            yield version
        finally:
            self._release(version.key)

    def find(self, reference: Reference) -> Version:
        """Any version, whatever its state; without a number the current one, else the newest. Raises NotFound."""
        with self._lock:
            found = [v for v in self._of(reference.name) if reference.number in (None, v.number)]
            current = self._current.get(reference.name)
            if not found:
                raise self._missing(reference)
            return next((v for v in found if v.key == current), found[-1])

    def current(self, name: str) -> Version | None:
        """The version that new requests get, if there is one."""
        with self._lock:
            key = self._current.get(name)
            return None if key is None else self._versions[key]

    def get(self, key: int) -> Version | None:
        with self._lock:
            return self._versions.get(key)

    def all(self) -> list[Version]:
        """Every version, by name and number."""
        with self._lock:
            return sorted(self._versions.values(), key=lambda v: (v.name, v.number))

    def in_flight(self, key: int) -> int:
        """Calls that are using a version now."""
        with self._lock:
            return self._leases[key]

    def begin(self, name: str, source: Source, content_hash: str) -> Version:
        """A new version with the next number, LOADING; requests do not see it yet."""
        with self._lock:
            self._last[name] += 1
            version = Version(next(self._keys), name, self._last[name], source, content_hash)
            self._versions[version.key] = version
            return version

    def describe(self, key: int, card: Card) -> Version:
        """Notes what was learnt from the bytes."""
        return self._change(key, card=card)

    def admit(self, key: int, device_bytes: int, shared_bytes: int = 0) -> Version | None:
        """Makes a version the one that new requests get; returns the one it replaces, DRAINING from here on."""
        version = self._change(key, state=State.RESIDENT, device_bytes=device_bytes, shared_bytes=shared_bytes)
        with self._lock:
            before = self._current.get(version.name)
            self._current[version.name] = key
            return None if before is None else self._drain(before)

    def abandon(self, key: int) -> None:
        """Forgets a version that was never admitted; nothing was answered under its number, so that is free again."""
        with self._lock:
            version = self._versions.pop(key)
            assert version.state is State.LOADING
            if self._last[version.name] == version.number:
                self._last[version.name] -= 1

    def withdraw(self, reference: Reference) -> tuple[Version, ...]:
        """Takes versions out of service: no new request reaches them. Raises NotFound.

        Without a number all of the name; those that are draining already are among the answer.
        """
        with self._lock:
            found = [
                v
                for v in self._of(reference.name)
                if reference.number in (None, v.number) and v.state is not State.LOADING
            ]
            if not found:
                raise self._missing(reference)
            return tuple(self._drain(v.key) for v in found)

    def drained(self, key: int) -> Future[None]:
        """Done when a DRAINING version has no lease left."""
        with self._lock:
            return self._drained[key]

    def drop(self, key: int) -> None:
        """Forgets a version whose memory was given back."""
        with self._lock:
            del self._versions[key]
            self._drained.pop(key)

    def fetch(self, key: int) -> Delta:
        """A version's bytes again, after its memory was given to others, or a combination's.

        Raises DataLoss if they are not the same.
        """
        combination = self.combinations.get(key)
        if combination is not None:
            return self.combinations.composed(combination.parts)
        version = self.get(key)
        if version is None:
            raise NotFound(f"version {key} is not in the catalog any more", metadata={"key": str(key)})
        try:
            delta = self._read(version.source)
        except (OSError, DeltaserveError) as error:
            raise _lost(version, f"cannot be read again: {error}") from error
        if delta.provenance.content_hash != version.content_hash:
            raise _lost(version, "has changed on disk since it was loaded")
        return delta

    def _of(self, name: str) -> list[Version]:
        return sorted((v for v in self._versions.values() if v.name == name), key=lambda v: v.number)

    def _resolve(self, reference: Reference) -> Version:
        key = self._current.get(reference.name)
        if key is None or reference.number not in (None, self._versions[key].number):
            raise self._missing(reference)
        return self._versions[key]

    def _missing(self, reference: Reference) -> NotFound:
        same = self._of(reference.name)
        current = self._current.get(reference.name)
        if current is not None:
            hint = f"the version in service is {self._versions[current].label}"
            nearest = [self._versions[current].label]
        elif same:
            hint = f"{same[-1].label} is {same[-1].state}"
            nearest = []
        else:
            nearest = difflib.get_close_matches(reference.name, sorted(self._current), n=3)
            quoted = ", ".join(f'"{name}"' for name in nearest)
            hint = (
                f"did you mean {quoted}?"
                if nearest
                else f"{len(self._current)} others are loaded; ListDeltas names them"
            )
        return NotFound(
            f'no delta "{reference}" in service; {hint}',
            field="deltas",
            metadata={"delta": str(reference), "nearest": ",".join(nearest)},
        )

    def _change(self, key: int, **changes: object) -> Version:
        with self._lock:
            self._versions[key] = changed = replace(self._versions[key], **changes)  # type: ignore[arg-type]
            return changed

    def _drain(self, key: int) -> Version:
        version = self._versions[key]
        if version.state is not State.DRAINING:
            self._versions[key] = version = replace(version, state=State.DRAINING)
            if self._current.get(version.name) == key:
                del self._current[version.name]
            self._drained[key] = Future()
            self._drained[key].set_running_or_notify_cancel()  # who stops waiting for it cannot cancel it
            if not self._leases[key]:
                self._drained[key].set_result(None)
        return version

    def _release(self, key: int) -> None:
        done: Future[None] | None = None
        with self._lock:
            self._leases[key] -= 1
            if not self._leases[key]:
                del self._leases[key]
                done = self._drained.get(key)
        if done is not None:
            done.set_result(None)


def _lost(version: Version, what: str) -> DataLoss:
    return DataLoss(
        f"{version.label}: {version.source.shown} {what}; load it again under a new version",
        metadata={"delta": version.label, "source": version.source.shown},
    )
