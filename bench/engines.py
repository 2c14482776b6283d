"""A mixed batch of deltas of all kinds through the engine on a device, against each request alone on the CPU."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bench import deltas, shapes
from bench.rows import Row
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Pooling
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.engine.request import DeltaRef, Event, Failed, Finished, Job, Request, Sampling, Tokens
from deltaserve_kernels.testing import error_ratio

SHAPES = ("tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5")
LIMIT = 1e-4
"""Error ratio of vectors and log-probabilities: another device sums in another order, through all layers."""
PATIENCE = 120.0


@dataclass(eq=False)
class Answers:
    """What an engine says. `vectors` holds scores, pooled rows and log-probabilities; `tokens` what was generated."""

    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ended: threading.Condition = field(default_factory=threading.Condition)
    ends: set[str] = field(default_factory=set)

    def emit(self, events: Sequence[Event]) -> None:
        with self.ended:
            for event in events:
                match event:
                    case Tokens(request_id, ids):
                        self.tokens[request_id] += ids
                    case Failed(request_id, error):
                        self.failed[request_id] = error.message
                        self.ends.add(request_id)
                    case Finished(request_id):
                        told = event.vector or tuple(p.chosen.logprob for p in event.positions)
                        numbers = told or tuple(score for row in event.scores for score in row)
                        if numbers:
                            self.vectors[request_id] = torch.tensor(numbers)
                        self.ends.add(request_id)
            self.ended.notify_all()

    def wait(self, requests: Sequence[Request]) -> None:
        with self.ended:
            if not self.ended.wait_for(lambda: self.ends >= {r.id for r in requests}, PATIENCE):
                raise TimeoutError(f"the engine gave no end to {[r.id for r in requests if r.id not in self.ends]}")


def check(device: torch.device, seed: int) -> Iterator[Row]:
    """A row for each family: greedy tokens must be equal, numbers within LIMIT."""
    for shape in SHAPES:
        right, _ = _answers(shape, torch.device("cpu"), seed, together=False)
        ours, mixed = _answers(shape, device, seed, together=True)
        worst = max(error_ratio(ours.vectors[each], right.vectors[each]) for each in right.vectors)
        differing = [each for each in right.tokens if ours.tokens[each] != right.tokens[each]]
        failed = ours.failed | right.failed
        same_for_all = len({tuple(tokens) for tokens in right.tokens.values()}) == 1 < len(right.tokens)
        wrong = worst > LIMIT or differing or failed or same_for_all
        note = f"{len(right.ends)} requests; at most {mixed} deltas in one forward"
        if failed:
            note = "; ".join(f"{name}: {message}" for name, message in failed.items())
        elif differing:
            note += f"; other tokens for {', '.join(differing)}"
        yield Row(
            "gpu.engine", "wrong" if wrong else "right", {"shape": shape, "dtype": "float32"},
            error_ratio=worst, limit=LIMIT, note=note,
        )  # fmt: skip


def _answers(shape: str, device: torch.device, seed: int, *, together: bool) -> tuple[Answers, int]:
    """What every request gets, and the most deltas that one forward served."""
    backbone = shapes.backbone(shape, torch.float32, device, seed, scale=0.15)
    made = deltas.of_all_kinds(backbone.spec, seed)
    settings = EngineSettings(pool_bytes=16 << 20, kv_bytes=16 << 20, batch_wait=0.2 if together else 0.0)
    engine = Engine(backbone, settings, made.__getitem__)
    engine.start()
    answers = Answers()
    try:
        for key, delta in enumerate(made):
            engine.publish(key, delta, f"d{key}@1").result(PATIENCE)
        requests = _requests(made, backbone.spec.tasks, seed)
        for group in [requests] if together else [[request] for request in requests]:
            engine.submit(group, answers.emit)
            answers.wait(group)
        steps = engine.stats(steps=True).steps
    finally:
        engine.drain(0)
    return answers, max(len(step.deltas) for step in steps)


def _requests(made: Sequence[Delta], tasks: frozenset[str], seed: int) -> list[Request]:
    """Every delta, and the bare backbone, with every job that the family and the delta do."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for number in range(-1, len(made)):
        delta = None if number < 0 else made[number]
        reference = None
        if delta is not None:
            known = delta.kinds, delta.prompt_length, delta.position_shift, delta.invocation
            reference = DeltaRef(number, f"d{number}@1", *known)
        ids = tuple(torch.randint(3, 101, (5 + 3 * (number % 4),), generator=random).tolist())
        name = "bare" if delta is None else "+".join(delta.kinds) + f"-{number}"
        if "generate" in tasks:
            sampling = Sampling(max_new_tokens=12)
            found.append(Request(f"{name} generate", Job.GENERATE, ids, reference, sampling=sampling))
        if "score" in tasks:
            found.append(Request(f"{name} score", Job.SCORE, ids, reference, continuation=ids[::-1]))
        found.append(Request(f"{name} embed", Job.EMBED, ids, reference, pooling=Pooling.MEAN))
        if delta is not None and delta.head is not None:
            found.append(Request(f"{name} classify", Job.CLASSIFY, ids, reference))
    return found
