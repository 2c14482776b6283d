"""Checkpoints that PEFT wrote, lowered and driven through an engine in this process, without a server between."""

import hashlib
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, VOCABULARY
from methods import Case
from reference import Answer, answer, backbone, told, tuned

from deltaserve.backbone.load import load
from deltaserve.deltas.delta import Delta
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.engine.request import (
    DeltaRef,
    Event,
    Failed,
    Finished,
    Job,
    PositionLogprobs,
    Request,
    Sampling,
    Tokens,
)
from deltaserve.formats.registry import read
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted

PATIENCE = 60.0


def written(family: str, chosen: Iterable[Case], folder: Path, dtype: torch.dtype = torch.float32) -> dict[Case, Any]:
    """Writes `backbone` and a folder for each case below `folder`; returns PEFT's models."""
    if not (folder / "backbone").is_dir():
        backbone(FAMILIES[family], folder / "backbone")
    models = {}
    for case in chosen:
        models[case] = tuned(case, folder / "backbone", dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            models[case].save_pretrained(folder / case.name)
    return models


def forced(case: Case, model: Any, ids: list[int], tokens: list[int]) -> torch.Tensor:
    """What a model says where its output is given: log-probabilities [tokens, vocabulary]; without tokens, `answer`."""
    if not tokens:
        return answer(case, model, ids)[1]
    with torch.no_grad():
        if FAMILIES[case.family].encoder_decoder:
            given = torch.tensor([[0, *tokens[:-1]]])
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=given, **told(model)).logits
        else:
            logits = model(input_ids=torch.tensor([[*ids, *tokens[:-1]]]), **told(model)).logits
    return torch.log_softmax(logits[0, -len(tokens) :].float(), -1)


class Driven:
    """An engine over `folder / "backbone"`, started, with other settings by name; deltas are known by name."""

    def __init__(self, folder: Path, dtype: str = "float32", **changed: Any) -> None:
        self.folder = folder
        self.backbone = load(str(folder / "backbone"), dtype=dtype, device="cpu")
        self.before = self.checksum()
        self.deltas: dict[str, Delta] = {}
        self._keys: dict[str, int] = {}
        given: dict[str, Any] = {"pool_bytes": 64 << 20, "kv_bytes": 8 << 20, "threads": 1}
        settings = EngineSettings(**(given | changed))
        self.engine = Engine(self.backbone, settings, lambda key: self.deltas[list(self._keys)[key]])
        self.engine.start()

    def stop(self) -> None:
        self.engine.drain(0)

    def lower(self, name: str, wanted: Wanted = NOTHING_WANTED, allow_pickle: bool = False) -> int:
        """Reads the checkpoint of a name and publishes it; returns its bytes on the device."""
        spec, weights = self.backbone.spec, self.backbone.weights
        return self.publish(name, read(self.folder / name, spec, weights, wanted, allow_pickle=allow_pickle))

    def publish(self, name: str, delta: Delta) -> int:
        self.deltas[name] = delta
        self._keys[name] = len(self._keys)
        return self.engine.publish(self._keys[name], delta, f"{name}@1").result(PATIENCE)

    def ref(self, name: str | None) -> DeltaRef | None:
        if name is None:
            return None
        delta = self.deltas[name]
        known = delta.kinds, delta.prompt_length, delta.position_shift, delta.invocation
        return DeltaRef(self._keys[name], f"{name}@1", *known, delta.prompt_place, delta.whole)

    def answers(self, requests: Sequence[Request], arrivals: Sequence[int] = ()) -> list[Answer]:
        """What each request gets; number i joins after `arrivals[i]` steps, or sooner where nothing else runs."""
        run = _Run(self.engine, requests, arrivals or [0] * len(requests))
        return run.answers()

    def checksum(self) -> str:
        """SHA-256 over every parameter and buffer of the backbone."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.backbone.model.state_dict().items()):
            found.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class _Run:
    """Requests on their way; `_steps` counts the steps that told something."""

    def __init__(self, engine: Engine, requests: Sequence[Request], arrivals: Sequence[int]) -> None:
        self._engine = engine
        self._requests = requests
        self._due = sorted(zip(arrivals, range(len(requests)), strict=True))
        self._steps = self._running = 0
        self._tokens: dict[str, list[Tokens]] = {request.id: [] for request in requests}
        self._ended: dict[str, Finished] = {}
        self._wrong: list[Exception] = []
        self._lock, self._over = threading.Lock(), threading.Event()

    def answers(self) -> list[Answer]:
        self._go_on()
        assert self._over.wait(PATIENCE), f"no end of {self._tokens.keys() - self._ended.keys()}"
        if self._wrong:
            raise self._wrong[0]
        return [_answer(request, self._tokens[request.id], self._ended[request.id]) for request in self._requests]

    def _emit(self, events: Sequence[Event]) -> None:
        with self._lock:
            self._steps += 1
            for event in events:
                match event:
                    case Tokens():
                        self._tokens[event.request_id].append(event)
                    case Finished():
                        self._ended[event.request_id] = event
                        self._running -= 1
                    case Failed():
                        self._wrong.append(event.error)
                        self._over.set()
        self._go_on()

    def _go_on(self) -> None:
        with self._lock:
            joining = []
            while self._due and (self._due[0][0] <= self._steps or not self._running):
                joining.append(self._requests[self._due.pop(0)[1]])
                self._running += 1
            over = not self._due and not self._running
        if joining:
            self._engine.submit(joining, self._emit)
        if over:
            self._over.set()


def _answer(request: Request, tokens: Sequence[Tokens], end: Finished) -> Answer:
    match request.job:
        case Job.GENERATE:
            places = [place for event in tokens for place in (*event.prompt_logprobs, *event.logprobs)]
            return [token for event in tokens for token in event.ids], _rows(places)
        case Job.SCORE:
            return [], _rows(end.positions)
        case Job.CLASSIFY:
            return [], torch.tensor(end.scores)
        case Job.EMBED:
            return [], torch.tensor([end.vector])


def _rows(places: Sequence[PositionLogprobs]) -> torch.Tensor:
    """Log-probabilities [n, vocabulary]."""
    rows = torch.full((len(places), VOCABULARY), float("nan"))
    for row, place in zip(rows, places, strict=True):
        for one in place.top:
            row[one.id] = one.logprob
    return rows


def greedy(count: int) -> Sampling:
    """`count` tokens whatever they are, and every log-probability beside each."""
    return Sampling(max_new_tokens=count, logprobs=VOCABULARY)
