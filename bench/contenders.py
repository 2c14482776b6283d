"""Ways to serve the same requests of several tasks, each as one piece of work: `before` it, and what is timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench import deltas as peft_deltas
from bench import shapes
from bench.answers import Answers
from bench.plain import Batch, Copy
from bench.served import Served
from bench.shapes import Twins
from bench.tasks import Asked
from deltaserve.deltas.delta import Delta

BARE, OURS = "bare backbone", "deltaserve"
COPIES, BESIDE = "copies in turn", "copies side by side"
SWAP = "one copy, weights swapped"
PEFT_MIXED, PEFT_SET = "PEFT, mixed batch", "PEFT, set_adapter"


@dataclass(frozen=True, eq=False)
class Contender:
    """`begin(told)` reads the inputs of a generation, `run(told)` is timed; `told` asks for log-probabilities."""

    name: str
    run: Callable[[bool], Answers]
    begin: Callable[[bool], None] = lambda told: None


def deltaserve(name: str, served: Served, asked: Asked) -> Contender:
    """One engine, one mixed batch."""
    if not asked.generate:
        return Contender(name, lambda told: served.encode(asked))
    return Contender(name, lambda told: served.finish(), lambda told: served.begin(asked, told))


def copies(fleet: Sequence[Copy], asked: Asked) -> Contender:
    """The model of each task that is asked for, one after the other with all threads; each batches its own requests."""
    batches = {task: fleet[task].batch(asked.ids[group]) for task, group in asked.groups.items()}

    def begin(told: bool) -> None:
        for batch in batches.values():
            batch.begin(told)

    def run(told: bool) -> Answers:
        if not asked.generate:
            return _joined(asked, {task: Answers(batch.encode()) for task, batch in batches.items()})
        for _ in range(asked.generate - 1):
            for batch in batches.values():
                batch.step(told)
        return _joined(asked, {task: batch.answers() for task, batch in batches.items()})

    return Contender(COPIES, run, begin if asked.generate else lambda told: None)


@contextmanager
def beside(fleet: Sequence[Copy], asked: Asked) -> Iterator[Contender]:
    """The same models at the same time, each with one thread, as many as there are threads."""
    batches = {task: fleet[task].batch(asked.ids[group]) for task, group in asked.groups.items()}

    def whole(batch: Batch, told: bool) -> Answers:
        if not asked.generate:
            return Answers(batch.encode())
        for _ in range(asked.generate - 1):
            batch.step(told)
        return batch.answers()

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=lambda: torch.set_num_threads(1)) as pool:

        def begin(told: bool) -> None:
            list(pool.map(lambda batch: batch.begin(told), batches.values()))

        def run(told: bool) -> Answers:
            answers = pool.map(lambda batch: whole(batch, told), batches.values())
            return _joined(asked, dict(zip(batches, answers, strict=True)))

        yield Contender(BESIDE, run, begin if asked.generate else lambda told: None)


def swapped(model: Copy, held: Sequence[Delta], asked: Asked) -> Contender:
    """One model: for each task in turn its weights are merged, then all its requests are served to their end."""
    return _one_model(
        SWAP, asked, lambda task: model.take(held[task]), lambda task, ids: Batch(model.model, ids, held[task])
    )


def peft_set(model: Any, asked: Asked) -> Contender:
    """PEFT's model with all adapters: for each task in turn its adapter is made active."""
    return _one_model(PEFT_SET, asked, lambda task: model.set_adapter(f"d{task}"), lambda task, ids: Batch(model, ids))


def peft_mixed(model: Any, asked: Asked) -> Contender:
    """PEFT's own mixed batch: each row names its adapter."""
    batch = Batch(model, asked.ids, more={"adapter_names": [f"d{task}" for task in asked.tasks]})

    def run(told: bool) -> Answers:
        if not asked.generate:
            return Answers(batch.encode())
        for _ in range(asked.generate - 1):
            batch.step(told)
        return batch.answers()

    return Contender(PEFT_MIXED, run, batch.begin if asked.generate else lambda told: None)


def in_peft(shape: str, pair: Twins, held: Sequence[Delta]) -> Any:
    """A model of its own over the same weights, with the tasks' LoRA in PEFT's tuners."""
    family = pair.ours.family
    prefix = f"{family.prefix}." if family.base_only else ""
    return peft_deltas.in_peft(shapes.sharing(shape, pair.ours), prefix, held)


def _one_model(
    name: str, asked: Asked, turn: Callable[[int], None], made: Callable[[int, torch.Tensor], Batch]
) -> Contender:
    batches = {task: made(task, asked.ids[group]) for task, group in asked.groups.items()}

    def begin(told: bool) -> None:
        for task, batch in batches.items():
            turn(task)
            batch.begin(told)

    def run(told: bool) -> Answers:
        answers = {}
        for task, batch in batches.items():
            turn(task)
            if not asked.generate:
                answers[task] = Answers(batch.encode())
                continue
            for _ in range(asked.generate - 1):
                batch.step(told)
            answers[task] = batch.answers()
        return _joined(asked, answers)

    return Contender(name, run, begin if asked.generate else lambda told: None)


def _joined(asked: Asked, answers: Mapping[int, Answers]) -> Answers:
    """In the requests' own order."""
    places = torch.tensor([number for group in asked.groups.values() for number in group])
    order = places.argsort()
    numbers = torch.cat([answers[task].numbers for task in asked.groups])[order]
    tokens = [answers[task].tokens for task in asked.groups]
    known = [each for each in tokens if each is not None]
    return Answers(numbers, torch.cat(known)[order] if known else None)
