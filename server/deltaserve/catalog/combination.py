"""Deltas made of several versions, for requests that name more than one. Not listed: they are what their members are.

A combination lives as long as all its members do, and while it is among those that were asked for last.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from deltaserve.catalog.version import Card, Version
from deltaserve.deltas.compose import Member, compose
from deltaserve.deltas.delta import Delta
from deltaserve.engine.request import DeltaRef
from deltaserve.errors import FailedPrecondition, ResourceExhausted

MOST = 256
"""Combinations that are known at one time, and refusals that are remembered."""


@dataclass(frozen=True)
class Part:
    """A member and its weight."""

    version: Version
    weight: float = 1.0

    @property
    def label(self) -> str:
        return self.version.label if self.weight == 1.0 else f"{self.weight:.9g}*{self.version.label}"

    @property
    def name(self) -> str:
        return self.version.name if self.weight == 1.0 else f"{self.weight:.9g}*{self.version.name}"


Parts = tuple[Part, ...]


@dataclass(frozen=True)
class Combination:
    """`key` is unique for ever, among versions too. `label` is `a@1+0.5*b@2`."""

    key: int
    parts: Parts
    content_hash: str
    card: Card

    @property
    def label(self) -> str:
        return "+".join(part.label for part in self.parts)

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    @property
    def ref(self) -> DeltaRef:
        return self.card.ref(self.key, self.label)


Answering = Version | Combination
"""What can answer a request."""

_Identity = tuple[tuple[int, float], ...]


class Combinations:
    """`fetch` reads a version's delta. Any thread; whoever asks holds leases of all members meanwhile.

    `find` or, where there is none, `composed` and `enter`; `lease` while it is used; `leaving` with each member.
    """

    def __init__(self, fetch: Callable[[int], Delta], keys: Iterator[int], most: int = MOST) -> None:
        self._fetch = fetch
        self._numbers = keys
        self._most = most
        self._lock = Lock()
        self._known: OrderedDict[_Identity, Combination] = OrderedDict()
        self._keys: dict[int, _Identity] = {}
        self._leases: Counter[int] = Counter()
        self._refused: OrderedDict[_Identity, FailedPrecondition] = OrderedDict()

    def get(self, key: int) -> Combination | None:
        with self._lock:
            identity = self._keys.get(key)
            return None if identity is None else self._known[identity]

    def find(self, parts: Parts) -> Combination | None:
        """The combination of these members, or None. Raises FailedPrecondition where they are known not to combine."""
        identity = _identity(parts)
        with self._lock:
            refused = self._refused.get(identity)
            if refused is not None:
                raise FailedPrecondition(
                    refused.message, reason=refused.reason, field=refused.field, metadata=refused.metadata
                )
            if identity in self._known:
                self._known.move_to_end(identity)
            return self._known.get(identity)

    def composed(self, parts: Parts) -> Delta:
        """Reads the members and makes one delta of them. Raises FailedPrecondition, and what reading raises."""
        deltas = [self._fetch(part.version.key) for part in parts]
        try:
            return compose(
                [Member(part.version.label, delta, part.weight) for part, delta in zip(parts, deltas, strict=True)]
            )
        except FailedPrecondition as error:
            with self._lock:
                self._refused[_identity(parts)] = error
                if len(self._refused) > self._most:
                    self._refused.popitem(last=False)
            raise

    def enter(self, parts: Parts, delta: Delta) -> Combination:
        """Notes what was composed."""
        identity = _identity(parts)
        with self._lock:
            assert identity not in self._known
            made = Combination(next(self._numbers), parts, delta.provenance.content_hash, Card.of(delta))
            self._known[identity] = made
            self._keys[made.key] = identity
            return made

    @contextmanager
    def lease(self, combination: Combination) -> Iterator[None]:
        """Until the end of the block it is not among those that are forgotten for others."""
        with self._lock:
            self._leases[combination.key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases[combination.key] -= 1
                if not self._leases[combination.key]:
                    del self._leases[combination.key]

    def crowded(self) -> Combination | None:
        """Where one more would be too many: the one to be dropped for it.

        Raises ResourceExhausted where all are in use.
        """
        with self._lock:
            if len(self._known) < self._most:
                return None
            for combination in self._known.values():
                if combination.key not in self._leases:
                    return combination
        raise ResourceExhausted(
            f"{self._most} combinations of deltas are in use; try again later",
            reason="COMBINATIONS_FULL",
            field="deltas",
            retry_after=1.0,
        )

    def drop(self, combination: Combination) -> None:
        with self._lock:
            identity = self._keys.pop(combination.key, None)
            if identity is not None:
                del self._known[identity]

    def leaving(self, version: int) -> Sequence[Combination]:
        """Forgets all that a version is a member of; returns those whose memory is to be given back."""
        with self._lock:
            gone = [each for each in self._known.values() if any(part.version.key == version for part in each.parts)]
            for each in gone:
                del self._known[self._keys.pop(each.key)]
            for identity in [one for one in self._refused if any(key == version for key, _ in one)]:
                del self._refused[identity]
            return gone

    def count(self, keys: Sequence[int]) -> int:
        """How many of these keys are combinations'."""
        with self._lock:
            return sum(key in self._keys for key in keys)


def _identity(parts: Parts) -> _Identity:
    return tuple((part.version.key, part.weight) for part in parts)
