"""deltaserve's engine in this process, asked in a closed loop."""

import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from bench.answers import Answers
from bench.tasks import Asked
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.engine.request import (
    DeltaRef,
    Event,
    Failed,
    Finished,
    Job,
    Request,
    Sampling,
    StepRecord,
    Tokens,
)

PATIENCE = 300.0
_KV_BYTES, _LENGTH = 512 << 20, 96


class Served:
    """An engine with `deltas` resident, for as long as the context lasts; task t is deltas[t]. −1 is the bare backbone.

    `nbytes`: of the deltas on the device. With `fetched`, none is put there ahead of the requests.
    """

    def __init__(self, backbone: Backbone, deltas: Sequence[Delta], pool_bytes: int, fetched: bool = False) -> None:
        self._deltas, self._fetched = deltas, fetched
        self._refs = [_reference(key, delta) for key, delta in enumerate(deltas)]
        settings = EngineSettings(
            pool_bytes=pool_bytes,
            kv_bytes=_KV_BYTES,
            max_model_len=_LENGTH,
            threads=torch.get_num_threads(),
        )
        self._engine = Engine(backbone, settings, deltas.__getitem__, self._stepped)
        self._numbers = itertools.count()
        self._hold, self._held, self._on = threading.Event(), threading.Event(), threading.Event()
        self._waited: _Answering | None = None
        self._read = 0
        self.nbytes = 0

    def __enter__(self) -> Self:
        self._engine.start()
        if not self._fetched:
            made = [self._engine.publish(ref.key, self._deltas[ref.key], ref.label) for ref in self._refs]
            self.nbytes = sum(future.result(PATIENCE) for future in made)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on.set()
        self._hold.clear()
        for key in self._engine.stats().resident:
            self._engine.retire(key).result(PATIENCE)
        self._engine.drain(0)

    def encode(self, asked: Asked) -> Answers:
        requests = [
            self._request(Job.EMBED, ids, task, pooling=Pooling.MEAN)
            for ids, task in zip(asked.ids.tolist(), asked.tasks, strict=True)
        ]
        return self._submit(requests).answers()

    def begin(self, asked: Asked, told: bool = False) -> None:
        """Reads all inputs in one forward, chooses the first tokens, and holds the engine there."""
        sampling = Sampling(max_new_tokens=asked.generate, logprobs=0 if told else None)
        requests = [
            self._request(Job.GENERATE, ids, task, sampling=sampling)
            for ids, task in zip(asked.ids.tolist(), asked.tasks, strict=True)
        ]
        self._held.clear()
        self._on.clear()
        self._hold.set()
        self._waited = self._submit(requests)
        if not self._held.wait(PATIENCE):
            raise TimeoutError("the engine read no input")
        assert self._read == len(requests), "all inputs are read in one forward"

    def finish(self) -> Answers:
        """Lets it go on to the last token of each."""
        assert self._waited is not None
        self._on.set()
        return self._waited.answers()

    def _stepped(self, record: StepRecord) -> None:
        """On the engine's thread, after each forward."""
        if self._hold.is_set():
            self._read = record.output_tokens
            self._hold.clear()
            self._held.set()
            self._on.wait()

    def _request(
        self,
        job: Job,
        ids: Sequence[int],
        task: int,
        sampling: Sampling | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        delta = None if task < 0 else self._refs[task]
        return Request(f"r{next(self._numbers)}", job, tuple(ids), delta, sampling=sampling, pooling=pooling)

    def _submit(self, requests: Sequence[Request]) -> "_Answering":
        answering = _Answering(requests)
        self._engine.submit(requests, answering.emit)
        return answering


class _Answering:
    """Collects the events of some requests."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._order = [request.id for request in requests]
        self._tokens: dict[str, list[int]] = {name: [] for name in self._order}
        self._numbers: dict[str, list[float]] = {name: [] for name in self._order}
        self._failed: list[str] = []
        self._left = len(requests)
        self._ended = threading.Event()

    def emit(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Tokens(request_id, ids, logprobs):
                    self._tokens[request_id] += ids
                    self._numbers[request_id] += [position.chosen.logprob for position in logprobs]
                    continue
                case Finished(request_id):
                    self._numbers[request_id] += event.vector
                case Failed(request_id, error):
                    self._failed.append(error.message)
            self._left -= 1
        if not self._left:
            self._ended.set()

    def answers(self) -> Answers:
        if not self._ended.wait(PATIENCE):
            raise TimeoutError(f"{self._left} of {len(self._order)} requests have no end")
        if self._failed:
            raise RuntimeError(f"{len(self._failed)} requests failed: {self._failed[0]}")
        tokens = [self._tokens[name] for name in self._order]
        numbers = torch.tensor([self._numbers[name] for name in self._order])
        return Answers(numbers, torch.tensor(tokens) if tokens[0] else None)


def _reference(key: int, delta: Delta) -> DeltaRef:
    return DeltaRef(
        key,
        f"task{key}@1",
        delta.kinds,
        delta.prompt_length,
        delta.position_shift,
        delta.invocation,
        delta.prompt_place,
        delta.whole,
    )
