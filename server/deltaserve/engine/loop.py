"""The engine: one thread that alone touches the device. Requests in, events out, one forward after the other."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future

import torch

from deltaserve.backbone.load import DTYPES
from deltaserve.backbone.model import SLOTS, Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.engine.kvcache import KVCache
from deltaserve.engine.outbox import Outbox
from deltaserve.engine.refusals import needs_whole_sequences, too_large
from deltaserve.engine.request import (
    Emit,
    EngineStats,
    Failed,
    Finished,
    FinishReason,
    Job,
    Request,
    StepRecord,
    Tokens,
)
from deltaserve.engine.residency import Residency
from deltaserve.engine.runner import Outcome, Runner
from deltaserve.engine.scheduler import Batch, Scheduler
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.settings import EngineSettings, limits
from deltaserve.errors import (
    Cancelled,
    DeadlineExceeded,
    DeltaserveError,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from deltaserve.pool.pool import Pool

__all__ = ["STEPS", "Engine", "EngineSettings"]

log = logging.getLogger(__name__)

STEPS = 1000
"""Steps that are remembered."""
_IDLE = 0.5


class Engine:
    """`submit`, `cancel`, `publish`, `retire`, `stats` and `drain` may be called from any thread.

    `fetch(key)` reads a delta that was evicted; `on_step` gets each forward's record on the engine's thread. `failure`
    is done, with the exception, if the thread ever dies of a bug outside a step. `shared_bytes(delta)` are the device
    bytes of a delta's bases, which are there once for all resident deltas that have them.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: EngineSettings,
        fetch: Callable[[int], Delta],
        on_step: Callable[[StepRecord], None] = lambda _: None,
    ) -> None:
        self.backbone = backbone
        self.limits = limits(backbone, settings)
        self.failure: Future[None] = Future()
        self._settings = settings
        self._on_step = on_step
        self._cache = KVCache(backbone, settings.kv_bytes)
        backbone.attach_cache(self._cache.arrays)
        self._pool = Pool(settings.pool_bytes, SLOTS, backbone.device, DTYPES.get(settings.delta_dtype))
        self.shared_bytes: Callable[[Delta], int] = self._pool.shared
        self._residency = Residency(backbone, self._pool, fetch, self._post, self._load_failed)
        self._runner = Runner(backbone)
        extents = self._cache.self_tokens, self._cache.memory_tokens
        self._scheduler = Scheduler(self.limits, *extents, self._acquire, self._starves)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequences: dict[str, Sequence] = {}
        self._outbox = Outbox()
        self._lock = threading.Lock()
        self._queued = 0
        self._refusal: Callable[[], DeltaserveError] | None = None
        self._ended = False
        self._steps: deque[StepRecord] = deque(maxlen=STEPS)
        self._index = 0
        self._thread = threading.Thread(target=self._main, name="deltaserve-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Items[Request], emit: Emit) -> None:
        """Queues all requests or none; each will end in exactly one Finished or Failed.

        Raises InvalidArgument for a request that could never run, FailedPrecondition for a generation with a delta that
        needs whole sequences, ResourceExhausted where the queue is full, Unavailable while draining, Internal where the
        engine's thread has died.
        """
        now, shape = time.monotonic(), self.backbone.family.shape
        sequences = [Sequence(request, emit, shape, now) for request in requests]
        for sequence in sequences:
            if not self._scheduler.fits(sequence):
                raise too_large(sequence, self.limits.max_batch_tokens, self._cache.self_tokens.capacity)
            if sequence.generates and sequence.request.delta is not None and sequence.request.delta.whole:
                raise needs_whole_sequences(sequence)
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            if self._queued + len(sequences) > self.limits.max_queued:
                raise ResourceExhausted(
                    f"{self._queued} sequences wait and {self.limits.max_queued} may (--max-queued); try again later",
                    reason="QUEUE_FULL",
                    retry_after=1.0,
                )
            assert all(s.request.id not in self._sequences for s in sequences), "request ids are unique"
            self._queued += len(sequences)
            self._sequences.update((s.request.id, s) for s in sequences)
            # Under the lock: whoever was not refused is in the inbox before the engine is told to stop.
            self._post(lambda: self._admit(sequences))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests with Failed(Cancelled); those that have ended are passed over."""
        ids = tuple(request_ids)
        error = Cancelled("the caller went away")
        self._post(lambda: self._mark(ids, error))

    def publish(self, key: int, delta: Delta, label: str) -> Future[int]:
        """Makes a delta resident; the result is its own device bytes. See `Residency.publish` for what it raises."""
        return self._ask(lambda asker: self._residency.publish(key, label, delta, asker))

    def retire(self, key: int) -> Future[int]:
        """Frees a delta once the requests that name it have ended; the result is the bytes freed."""
        return self._ask(lambda asker: self._residency.retire(key, asker))

    def stats(self, steps: bool = False) -> EngineStats:
        """Counters as of now; those of a running step may be one step old."""
        loading = self._residency.loading
        wanted = [s.request.delta for s in list(self._sequences.values()) if s.place is None]
        return EngineStats(
            running=self._scheduler.running,
            waiting=self._queued,
            waiting_for_load=sum(1 for delta in wanted if delta is not None and delta.key in loading),
            kv_capacity_tokens=self._cache.self_tokens.capacity,
            kv_used_tokens=self._cache.used_tokens,
            kv_capacity_bytes=self._cache.capacity_bytes,
            kv_used_bytes=self._cache.used_bytes,
            pool_capacity_bytes=self._pool.capacity,
            pool_used_bytes=self._pool.used,
            resident=self._pool.resident,
            pins=self._pool.pins,
            steps=tuple(self._steps) if steps else (),
        )

    def drain(self, seconds: float) -> None:
        """Refuses new requests, lets the others run for `seconds`, fails the rest with Unavailable, ends the thread."""
        with self._lock:
            if self._refusal is None:
                self._refusal = _draining
        end = time.monotonic() + seconds
        while self._sequences and time.monotonic() < end and self._thread.is_alive():
            threading.Event().wait(0.01)
        if self._thread.ident is None:
            self._stop()
        else:
            self._post(self._stop)
            self._thread.join()

    def _ask(self, work: Callable[[Future[int]], None]) -> Future[int]:
        asker: Future[int] = Future()
        # From here on a caller that goes away cannot cancel it: the work goes on, and its result has a place to go.
        asker.set_running_or_notify_cancel()
        with self._lock:
            if self._ended:
                asker.set_exception(Unavailable("the server is shutting down; nothing is loaded or unloaded any more"))
            else:
                self._post(lambda: work(asker))
        return asker

    # ---- the engine's thread

    def _main(self) -> None:
        torch.set_grad_enabled(False)
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        try:
            while not self._ended:
                self._take_inbox()
                self._expire()
                batch = None if self._gathering() else self._scheduler.schedule()
                if batch is not None:
                    self._step(batch)
                self._outbox.flush()
                if batch is None and not self._ended:
                    self._wait()
        except BaseException as error:
            log.exception("the engine's thread died")
            self._bury()
            self.failure.set_exception(error)
        else:
            self.failure.set_result(None)

    def _take_inbox(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _wait(self) -> None:
        """Sleeps until something comes; wakes for deadlines and for the end of --batch-wait-ms."""
        now = time.monotonic()
        ends = [now + _IDLE]
        ends += [s.request.deadline for s in self._scheduler.all() if s.request.deadline is not None]
        if self._gathering() and self._scheduler.oldest is not None:
            ends.append(self._scheduler.oldest + self._settings.batch_wait)
        try:
            self._inbox.get(timeout=max(min(ends) - now, 0.001))()
        except queue.Empty:
            return

    def _gathering(self) -> bool:
        """Whether a batch is still being gathered: nothing runs, and the first to wait has not waited long enough."""
        oldest = self._scheduler.oldest
        return (
            self._settings.batch_wait > 0
            and oldest is not None
            and self._scheduler.running == 0
            and self._scheduler.waiting < self.limits.max_running
            and time.monotonic() < oldest + self._settings.batch_wait
        )

    def _step(self, batch: Batch) -> None:
        sequences = batch.sequences
        self._leave_queue(sequences)
        started, begin = time.time(), time.perf_counter()
        try:
            outcomes = self._runner.run(batch)
        except Exception:
            log.exception("a forward failed; its %d requests fail, the others go on", len(sequences))
            error = Internal(
                "the forward that held this request failed; the server's log says why", reason="STEP_FAILED"
            )
            for sequence in sequences:
                self._end(sequence, Failed(sequence.request.id, error))
            return
        for chunk in batch.prefill:
            chunk.sequence.computed += chunk.count
        record = self._record(batch, sequences, started, time.perf_counter() - begin, outcomes)
        for outcome in outcomes:
            self._deliver(outcome)
        self._steps.append(record)
        self._on_step(record)

    def _record(
        self, batch: Batch, sequences: list[Sequence], started: float, duration: float, outcomes: list[Outcome]
    ) -> StepRecord:
        places = {s.slot: s.place for s in sequences if s.place is not None}
        ordered = [places[slot] for slot in sorted(places)]
        self._index += 1
        return StepRecord(
            index=self._index,
            started=started,
            duration=duration,
            rows=batch.rows,
            sequences=len(sequences),
            slots=tuple(p.slot for p in ordered),
            deltas=tuple(p.label for p in ordered),
            kinds=tuple(sorted({kind for p in ordered for kind in p.kinds})),
            phase=batch.phase,
            output_tokens=sum(1 for o in outcomes if o.token is not None),
        )

    def _deliver(self, outcome: Outcome) -> None:
        sequence, request = outcome.sequence, outcome.sequence.request
        if request.job is not Job.GENERATE:
            self._end(
                sequence,
                Finished(request.id, scores=outcome.scores, vector=outcome.vector, positions=outcome.positions),
            )
            return
        token, sampling = outcome.token, request.sampling
        assert sampling is not None
        if token is not None:
            sequence.output.append(token)
            sequence.counts[token] = sequence.counts.get(token, 0) + 1
        sequence.prompt_positions += outcome.positions
        if token is None:
            return
        positions, sequence.prompt_positions = tuple(sequence.prompt_positions), []
        self._outbox.put(sequence, Tokens(request.id, (token,), outcome.logprobs, positions))
        long_enough = len(sequence.output) >= max(sampling.min_new_tokens, 1)
        if long_enough and (token in sampling.end_ids or token in sampling.stop_ids):
            self._end(sequence, Finished(request.id, FinishReason.STOP))
        elif len(sequence.output) >= sampling.max_new_tokens:
            self._end(sequence, Finished(request.id, FinishReason.LENGTH))

    def _acquire(self, sequence: Sequence) -> bool:
        delta = sequence.request.delta
        if delta is None or sequence.place is not None:
            return True
        sequence.place = self._residency.pin(delta.key, delta.label)
        return sequence.place is not None

    def _starves(self, sequence: Sequence) -> bool:
        delta = sequence.request.delta
        return delta is not None and self._residency.starves(delta.key)

    def _admit(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.request.delta is not None:
                self._residency.use(sequence.request.delta.key, 1)
        self._scheduler.add(sequences)

    def _mark(self, ids: Items[str], error: DeltaserveError) -> None:
        for request_id in ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._end(sequence, Failed(request_id, error))

    def _expire(self) -> None:
        now = time.monotonic()
        late = [s for s in self._scheduler.all() if s.request.deadline is not None and s.request.deadline <= now]
        for sequence in late:
            error = DeadlineExceeded(f"the deadline passed after {len(sequence.output)} tokens")
            self._end(sequence, Failed(sequence.request.id, error))

    def _load_failed(self, key: int, error: DeltaserveError) -> None:
        for sequence in self._scheduler.all():
            delta = sequence.request.delta
            if delta is not None and delta.key == key and sequence.place is None:
                self._end(sequence, Failed(sequence.request.id, error))

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        """The one way out: KV, pin, use and queue entry are given back here and nowhere else."""
        request = sequence.request
        self._leave_queue((sequence,))
        self._scheduler.remove(sequence)
        if sequence.place is not None:
            self._residency.unpin(sequence.place)
            sequence.place = None
        if request.delta is not None:
            self._residency.use(request.delta.key, -1)
            self._residency.forget((request.delta.key,))
        del self._sequences[request.id]
        self._outbox.put(sequence, event)

    def _leave_queue(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.queued:
                sequence.queued = False
                with self._lock:
                    self._queued -= 1

    def _stop(self) -> None:
        if self._ended:
            return
        with self._lock:
            self._ended = True
        self._take_inbox()  # nothing comes after this but what the loader has to say
        error = Unavailable("the server is shutting down; this request was not finished")
        self._mark(tuple(self._sequences), error)
        self._outbox.flush()  # before the loader is waited for: it may be reading from a slow disk
        self._residency.stop()
        self._take_inbox()
        self._outbox.flush()

    def _bury(self) -> None:
        """Tells everybody after the thread died. The books may be what broke, so none are kept here."""
        with self._lock:
            self._ended = True
            self._refusal = _dead
        for sequence in list(self._sequences.values()):
            self._outbox.put(sequence, Failed(sequence.request.id, _dead()))
        self._sequences.clear()
        self._outbox.flush()
        for last in (self._take_inbox, self._residency.stop):
            try:
                last()
            except Exception:
                log.exception("the engine's thread could not end in order")

    def _post(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)


def _draining() -> DeltaserveError:
    return Unavailable("the server is shutting down; send this request to another one")


def _dead() -> DeltaserveError:
    return Internal("the engine stopped on a bug; the server's log says why", reason="ENGINE_DIED")
