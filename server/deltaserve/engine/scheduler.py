"""Which sequences are in the next forward. No torch here.

Running sequences decode first; then waiting ones are admitted in order of arrival, under budgets of rows, sequences
and KV tokens. A sequence whose delta is not on the device lets later ones pass, until it has waited too long for room;
one that lacks KV does not, so that large requests are not starved by small ones.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deltaserve.engine.request import Limits
from deltaserve.engine.sequence import Sequence
from deltaserve.pool.extents import Extents


@dataclass(frozen=True, eq=False)
class Chunk:
    """Input rows [start, start + count) of a sequence."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        return self.start + self.count == self.sequence.input_rows


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward. Both lists are ordered by slot, so that equal deltas stand together."""

    decode: tuple[Sequence, ...]
    prefill: tuple[Chunk, ...]

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decode, *(chunk.sequence for chunk in self.prefill)]

    @property
    def rows(self) -> int:
        return len(self.decode) + sum(chunk.count + chunk.sequence.decoder_rows for chunk in self.prefill)

    @property
    def phase(self) -> str:
        if not self.prefill:
            return "decode"
        if self.decode:
            return "mixed"
        return "prefill" if any(chunk.sequence.generates for chunk in self.prefill) else "encode"


class Scheduler:
    """`acquire(sequence)` pins its delta and says True, or starts a load and says False.

    `starves(sequence)`: its delta finds no room because those behind it in the queue keep others pinned.
    """

    def __init__(
        self,
        limits: Limits,
        self_tokens: Extents,
        memory_tokens: Extents,
        acquire: Callable[[Sequence], bool],
        starves: Callable[[Sequence], bool] = lambda _: False,
    ) -> None:
        self._limits = limits
        self._self = self_tokens
        self._memory = memory_tokens
        self._acquire = acquire
        self._starves = starves
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def oldest(self) -> float | None:
        """Arrival of the first waiting sequence."""
        return self._waiting[0].arrival if self._waiting else None

    def add(self, sequences: Iterable[Sequence]) -> None:
        self._waiting.extend(sequences)

    def all(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out wherever it is, and gives its KV back."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._give_back(sequence)

    def fits(self, sequence: Sequence) -> bool:
        """Whether an empty server could run it at all."""
        return all(
            not tokens or extents.rounded(tokens) <= extents.capacity
            for extents, tokens in ((self._self, sequence.self_tokens), (self._memory, sequence.memory_tokens))
        ) and (sequence.chunkable or sequence.input_rows + sequence.decoder_rows <= self._limits.max_batch_tokens)

    def schedule(self) -> Batch | None:
        """The next forward, or None where nothing can run."""
        budget = self._limits.max_batch_tokens
        decode = [s for s in self._running if s.decoding][:budget]
        budget -= len(decode)
        prefill: list[Chunk] = []
        for sequence in self._running:
            if not sequence.decoding and budget > 0:
                chunk = Chunk(sequence, sequence.computed, min(budget, sequence.input_rows - sequence.computed))
                prefill.append(chunk)
                budget -= chunk.count
        for sequence in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._limits.max_running:
                break
            need = sequence.input_rows + sequence.decoder_rows
            if need > budget and not sequence.chunkable:
                break
            if not self._acquire(sequence):
                if self._starves(sequence):
                    break
                continue
            if not self._reserve(sequence):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            chunk = Chunk(sequence, 0, min(budget - sequence.decoder_rows, sequence.input_rows))
            prefill.append(chunk)
            budget -= chunk.count + sequence.decoder_rows
        if not decode and not prefill:
            return None
        return Batch(
            tuple(sorted(decode, key=lambda s: s.slot)),
            tuple(sorted(prefill, key=lambda c: c.sequence.slot)),
        )

    def _reserve(self, sequence: Sequence) -> bool:
        """Both extents or none: half of one, held by a sequence that waits, could block those before it for ever."""
        wants = (
            (self._self, "self_start", sequence.self_tokens),
            (self._memory, "memory_start", sequence.memory_tokens),
        )
        for extents, name, tokens in wants:
            if tokens and getattr(sequence, name) is None:
                start = extents.take(tokens)
                if start is None:
                    self._give_back(sequence)
                    return False
                setattr(sequence, name, start)
        return True

    def _give_back(self, sequence: Sequence) -> None:
        for extents, name in ((self._self, "self_start"), (self._memory, "memory_start")):
            start = getattr(sequence, name)
            if start is not None:
                extents.give(start)
                setattr(sequence, name, None)
