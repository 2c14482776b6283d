"""One immutable version of a delta, as far as it is known without its bytes."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Pooling, Task
from deltaserve.engine.request import DeltaRef


class State(StrEnum):
    LOADING = "loading"  # being read, lowered or copied to the device
    RESIDENT = "resident"  # in device memory
    EVICTED = "evicted"  # known, but not in device memory; the next request loads it again
    DRAINING = "draining"  # takes no new requests; freed when the running ones have ended


@dataclass(frozen=True)
class Source:
    """Where a version is read from, and what the operator said about it. `shown` is relative to --delta-root."""

    folder: Path
    shown: str
    task: Task | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    task_id: int | None = None


@dataclass(frozen=True)
class Card:
    """What was learnt when it was read. `head_width` is 0 where there is no head."""

    kinds: tuple[str, ...] = ()
    sites: int = 0
    parameters: int = 0
    file_bytes: int = 0
    tensors_matched: int = 0
    warnings: tuple[str, ...] = ()
    task: Task | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    guessed: tuple[str, ...] = ()
    format: str = ""
    base_model: str = ""
    prompt_length: int = 0
    position_shift: int = 0
    invocation: tuple[int, ...] = ()
    pooling: Pooling | None = None
    head_width: int = 0
    task_id: int | None = None
    token_types: bool = True
    prompt_place: int | None = None
    whole: bool = False

    @staticmethod
    def of(delta: Delta) -> "Card":
        made = delta.provenance
        return Card(
            kinds=delta.kinds,
            sites=len(delta.at) + (delta.prompt is not None) + (delta.head is not None),
            parameters=delta.parameters,
            file_bytes=made.file_bytes,
            tensors_matched=made.tensors_matched,
            warnings=made.warnings,
            task=delta.task,
            labels=delta.labels,
            problem_type=delta.problem_type,
            guessed=made.guessed,
            format=made.format,
            base_model=made.base_model,
            prompt_length=delta.prompt_length,
            prompt_place=delta.prompt_place,
            whole=delta.whole,
            position_shift=delta.position_shift,
            invocation=delta.invocation,
            pooling=delta.pooling,
            head_width=0 if delta.head is None else delta.head.width,
            task_id=delta.task_id,
            token_types=delta.token_types,
        )

    def ref(self, key: int, label: str) -> DeltaRef:
        """What the engine needs to know before it has the bytes."""
        return DeltaRef(
            key=key,
            label=label,
            kinds=self.kinds,
            prompt_length=self.prompt_length,
            position_shift=self.position_shift,
            invocation=self.invocation,
            prompt_place=self.prompt_place,
            whole=self.whole,
        )


@dataclass(frozen=True)
class Version:
    """`key` is unique for ever; `number` is never given twice for one name. `state` is never EVICTED: see `now`.

    `device_bytes` are its own; `shared_bytes` those of its bases, which other versions may have too.
    """

    key: int
    name: str
    number: int
    source: Source
    content_hash: str
    state: State = State.LOADING
    card: Card = field(default_factory=Card)
    device_bytes: int = 0
    shared_bytes: int = 0

    @property
    def label(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def ref(self) -> DeltaRef:
        return self.card.ref(self.key, self.label)

    def now(self, resident: Collection[int]) -> State:
        """The state, given the keys that are in device memory."""
        if self.state is State.RESIDENT and self.key not in resident:
            return State.EVICTED
        return self.state
