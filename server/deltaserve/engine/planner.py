"""From a batch to a Plan: which rows stand where, on which axis, with which slot; and where results will be."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Axis, Pooling
from deltaserve.engine.request import Job
from deltaserve.engine.scheduler import Batch, Chunk
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.stager import Stager
from deltaserve.plan import Plan, PromptPiece, Stack
from deltaserve_kernels.attention.sequences import Sequence as Span
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import RowMap


@dataclass(frozen=True, eq=False)
class Sampled:
    """Rows [at, at + count) of the logits belong to a sequence.

    `draw`: the last of them gives the next token. `targets`: tokens that the first of them are to be scored with.
    """

    sequence: Sequence
    at: int
    count: int
    draw: bool
    targets: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Pooled:
    """A sequence that ends in rows, not tokens: `rows` of its hidden rows, or `pooled_rows` of the pooler's."""

    sequence: Sequence
    rows: tuple[int, int]
    pooled_rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """A plan and where its results will stand."""

    plan: Plan
    sampled: tuple[Sampled, ...]
    pooled: tuple[Pooled, ...]


@dataclass(eq=False)
class _Axis:
    """Rows of one axis as they are put down."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_types: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    prompts: list[PromptPiece] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    write: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.ids)

    def put(
        self, runs: Iterable[tuple[int, int]], ids: list[int], positions: Iterable[int], types: Iterable[int] | None
    ) -> None:
        self.ids.extend(ids)
        self.positions.extend(positions)
        self.token_types.extend([0] * len(ids) if types is None else types)
        self.runs.extend(runs)

    def stack(self, rows: torch.Tensor) -> Stack | None:
        return Stack(rows[0], rows[1], rows[2], tuple(self.prompts)) if self.ids else None


class Planner:
    """Lays batches out for one backbone. Decode rows stand first, then prefill, each group by slot.

    A sequence's rows before `acts_from` are bare rows, wherever they stand: to embed, to attend, to sample.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._device = backbone.device
        self._first_position = backbone.spec.first_position
        self._two_stacks = backbone.spec.encoder_decoder
        self._causal = {row.axis: row.causal for row in backbone.family.attentions}
        self._cached = {row.axis: row.cached for row in backbone.family.attentions}
        self._start_id = backbone.defaults.decoder_start_id or 0
        self._staging = Stager(self._device)
        self._poolings = {head.pooling for head in backbone.spec.heads.values()}

    def layout(self, batch: Batch) -> Layout:
        axes = {Axis.TOKENS: _Axis(), Axis.DECODER: _Axis()}
        memory: list[int] = []
        memory_spans: list[Span] = []
        memory_write: list[int] = []
        memory_runs: list[tuple[int, int]] = []
        sampled: list[Sampled] = []
        rows_sampled: list[int] = []
        slots_sampled: list[tuple[int, int]] = []
        pooled: list[Pooled] = []
        rows_pooled: list[int] = []
        runs_pooled: list[tuple[int, int]] = []
        averaged: list[int] = []

        def sample(
            sequence: Sequence, row: int, first: int, count: int, draw: bool, targets: tuple[int, ...] = ()
        ) -> None:
            sampled.append(Sampled(sequence, len(rows_sampled), count, draw, targets))
            rows_sampled.extend(range(row, row + count))
            slots_sampled.extend(sequence.slots(first, count))

        generating = axes[Axis.DECODER if self._two_stacks else Axis.TOKENS]
        for sequence in batch.decode:
            row = generating.rows
            index = len(sequence.output) if self._two_stacks else sequence.input_rows + len(sequence.output) - 1
            self._cached_rows(generating, sequence, [sequence.output[-1]], index)
            if self._two_stacks:
                memory_spans.append(self._cross(sequence, row, 1))
            sample(sequence, row, index, 1, draw=True)

        for chunk in batch.prefill:
            sequence, tokens = chunk.sequence, axes[Axis.TOKENS]
            first = tokens.rows
            self._input_rows(tokens, chunk)
            job = sequence.request.job
            if self._two_stacks and sequence.decoder_rows:
                start = sequence.memory_start
                assert start is not None
                memory.extend(range(first, first + chunk.count))
                memory_write.extend(range(start, start + chunk.count))
                memory_runs.append((sequence.slot, chunk.count))
                row = generating.rows
                ids = [self._start_id, *sequence.request.continuation[:-1]]
                self._cached_rows(generating, sequence, ids, 0)
                memory_spans.append(self._cross(sequence, row, len(ids)))
                sample(sequence, row, 0, len(ids), job is Job.GENERATE, sequence.request.continuation)
            elif job is Job.SCORE:
                count = len(sequence.request.continuation)
                before = chunk.count - count
                sample(sequence, first + before, before, count, False, sequence.request.continuation)
            elif job is Job.GENERATE:
                self._sample_prefill(chunk, first, sample)
            else:
                span, made = (first, first + chunk.count), len(averaged)
                read, counts = self._pooler_reads(sequence, *span)
                rows_pooled.extend(read)
                averaged.extend(counts)
                if counts:
                    runs_pooled.append((sequence.slot, len(counts)))
                pooled.append(Pooled(sequence, span, (made, len(averaged)) if counts else None))

        tokens, decoder = axes[Axis.TOKENS], axes[Axis.DECODER]
        maps = {
            Axis.TOKENS: tokens.runs,
            Axis.DECODER: decoder.runs,
            Axis.MEMORY: memory_runs,
            Axis.SAMPLED: slots_sampled,
            Axis.POOLED: runs_pooled,
        }
        attention = {
            Axis.TOKENS: (tokens.spans, tokens.write),
            Axis.DECODER: (decoder.spans, decoder.write),
            Axis.MEMORY: (memory_spans, memory_write),
        }
        numbers = {
            "tokens": [tokens.ids, tokens.positions, tokens.token_types],
            "decoder": [decoder.ids, decoder.positions, decoder.token_types],
            "memory": memory,
            "sampled": rows_sampled,
            "pooled": rows_pooled,
        }
        staged = self._staging.shipped(
            {name: torch.tensor(given, dtype=torch.int64) for name, given in numbers.items()},
            {axis: RowMap.of(runs, self._device) for axis, runs in maps.items()},
            {
                axis: (self._sequences(axis, spans), write if self._cached.get(axis, False) else [])
                for axis, (spans, write) in attention.items()
            },
        )
        plan = Plan(
            maps=staged.maps,
            attention=staged.attention,
            tokens=tokens.stack(staged.numbers["tokens"]),
            decoder=decoder.stack(staged.numbers["decoder"]),
            memory=staged.numbers["memory"],
            sampled=staged.numbers["sampled"],
            pooled=staged.numbers["pooled"],
            averaged=None if len(averaged) == len(rows_pooled) else tuple(averaged),
        )
        return Layout(plan, tuple(sampled), tuple(pooled))

    @staticmethod
    def _pooler_reads(sequence: Sequence, first: int, end: int) -> tuple[Collection[int], list[int]]:
        """Rows of a sequence that the backbone's pooler reads, and how many of them in turn make each of its own."""
        place = sequence.place
        if sequence.request.job is not Job.CLASSIFY or place is None or place.delta is None:
            return range(0), []
        match place.delta.pooling:
            case Pooling.POOLER:
                return range(first, first + 1), [1]
            case Pooling.POOLER_MEAN:
                return range(first, end), [end - first]
            case Pooling.POOLER_TOKENS:
                prompt = range(first + sequence.prompt_place, first + sequence.prompt_place + sequence.prompt_rows)
                own = [row for row in range(first, end) if row not in prompt]
                return own, [1] * len(own)
        return range(0), []

    def _input_rows(self, axis: _Axis, chunk: Chunk) -> None:
        """Soft-prompt rows and ids of a chunk; keys are this forward's rows, or the cache where the axis has one."""
        sequence, first = chunk.sequence, axis.rows
        end, prompt = chunk.start + chunk.count, sequence.prompt_rows
        if sequence.prompt_placed:
            self._placed_rows(axis, chunk)
            return
        in_prompt = max(min(end, prompt) - chunk.start, 0)
        low, high = max(chunk.start - prompt, 0), max(end - prompt, 0)
        ids = [0] * in_prompt + list(sequence.input_ids[low:high])
        given = sequence.request.token_type_ids
        types = None if given is None else [0] * in_prompt + list(given[low:high])
        if in_prompt:
            axis.prompts.append(PromptPiece(sequence.slot, first, chunk.start, in_prompt))
        if self._cached[Axis.TOKENS]:
            self._cached_rows(axis, sequence, ids, chunk.start, types)
        else:
            self._encoded_rows(axis, sequence, ids, self._positions(sequence, chunk.start, len(ids)), types)

    def _placed_rows(self, axis: _Axis, chunk: Chunk) -> None:
        """The same where the soft prompt stands among the rows that the embedding module gives."""
        sequence, place, prompt = chunk.sequence, chunk.sequence.prompt_place, chunk.sequence.prompt_rows
        assert not self._cached[Axis.TOKENS] and chunk.count == sequence.input_rows, "placed where a cache is"

        def around(own: Iterable[int]) -> list[int]:
            rows = list(own)
            return rows[:place] + [rows[0]] * prompt + rows[place:]

        ids, given = sequence.input_ids, sequence.request.token_type_ids
        axis.prompts.append(PromptPiece(sequence.slot, axis.rows + place, 0, prompt, placed=True))
        positions = around(self._positions(sequence, 0, len(ids)))
        self._encoded_rows(axis, sequence, around(ids), positions, None if given is None else around(given))

    def _positions(self, sequence: Sequence, index: int, count: int) -> range:
        first = self._first_position + index + sequence.position_shift
        return range(first, first + count)

    @staticmethod
    def _encoded_rows(
        axis: _Axis, sequence: Sequence, ids: list[int], positions: Iterable[int], types: list[int] | None
    ) -> None:
        """All rows of a sequence, which attend to one another."""
        first = axis.rows
        axis.put(sequence.slots(0, len(ids)), ids, positions, types)
        axis.spans.append(Span(first, len(ids), 0, first, len(ids), sequence.slot, False))

    def _cached_rows(
        self, axis: _Axis, sequence: Sequence, ids: list[int], index: int, types: list[int] | None = None
    ) -> None:
        """Rows whose keys and values go to the sequence's extent at `index` and after; they attend to all before."""
        start, first = sequence.self_start, axis.rows
        assert start is not None
        axis.put(sequence.slots(index, len(ids)), ids, self._positions(sequence, index, len(ids)), types)
        axis.spans.append(Span(first, len(ids), index, start, index + len(ids), sequence.slot, True))
        axis.write.extend(range(start + index, start + index + len(ids)))

    def _cross(self, sequence: Sequence, row: int, count: int) -> Span:
        assert sequence.memory_start is not None
        return Span(row, count, 0, sequence.memory_start, sequence.memory_tokens, sequence.slot, True)

    def _sequences(self, axis: Axis, spans: list[Span]) -> Sequences:
        return Sequences(tuple(spans), self._causal.get(axis, False))

    @staticmethod
    def _sample_prefill(chunk: Chunk, first: int, sample: "_Sample") -> None:
        """The last row of the last chunk draws; with prompt log-probabilities the rows of the input count too."""
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        assert sampling is not None
        end = chunk.start + chunk.count
        if sampling.prompt_logprobs is None:
            if chunk.last:
                sample(sequence, first + chunk.count - 1, end - 1, 1, True)
            return
        low = max(chunk.start, sequence.prompt_rows)
        if low < end:
            ids = sequence.request.ids
            targets = ids[low - sequence.prompt_rows + 1 : end - sequence.prompt_rows + 1]
            sample(sequence, first + low - chunk.start, low, end - low, chunk.last, targets)


class _Sample(Protocol):
    """The type of `sample` above: `row` is the first row on its axis, `first` the same within the sequence."""

    def __call__(
        self, sequence: Sequence, row: int, first: int, count: int, draw: bool, targets: tuple[int, ...] = ()
    ) -> None: ...
