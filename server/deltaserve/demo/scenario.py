"""What the demo does to a server, through the public client alone: loads under traffic, then one mixed batch."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltaserve.demo.results import Results
from deltaserve_client import Client, DeltaInfo, DeltaserveError, ServerInfo, Step

BACKGROUND_THREADS = 4
ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Question:
    """A held-out sentence for some deltas, or for the bare backbone with its instruction; and what is right."""

    deltas: tuple[str, ...]
    input: str
    expected: str

    @property
    def who(self) -> str:
        return "+".join(self.deltas) or "the bare backbone"


@dataclass(frozen=True)
class Answered:
    question: Question
    answer: str
    seconds: float
    output_tokens: int

    @property
    def right(self) -> bool:
        return self.answer == self.question.expected


@dataclass
class Traffic:
    """What the background client saw before, while and right after deltas were loaded."""

    answered: int = 0
    while_loading: int = 0
    slowest: float = 0.0  # seconds
    wrong: list[str] = field(default_factory=list)  # what went wrong, if anything did


@dataclass(frozen=True)
class Outcome:
    """`forwards`: the engine's steps that served the batch, and no other request."""

    loaded: tuple[DeltaInfo, ...]
    load_seconds: float
    traffic: Traffic
    answers: tuple[Answered, ...]
    forwards: tuple[Step, ...]
    info: ServerInfo

    @property
    def right(self) -> bool:
        return not self.traffic.wrong and all(answered.right for answered in self.answers)

    @property
    def widest(self) -> Step:
        """The forward with the most deltas, then the most kinds."""
        return max(self.forwards, key=lambda step: (len(step.deltas), len(step.kinds), step.sequences))


def questions(results: Results) -> tuple[Question, ...]:
    """One for each delta and each combination of several, then those for the bare backbone."""
    each = [Question((delta.name,), *delta.examples[0]) for delta in results.deltas]
    several = [Question(one.deltas, *one.examples[0]) for one in results.combinations]
    return (*each, *several, *(Question((), *example) for example in results.backbone.examples))


def play(client: Client, results: Results, heard: Callable[[DeltaInfo], None]) -> Outcome:
    """Runs it all; `heard` is told of each delta when it is resident. Raises what the client raises."""
    asked = questions(results)
    ask(client, asked[-1])  # the first forward of a process is slow, and is not what is shown
    with _traffic(client, asked) as (traffic, known):
        _until(traffic, BACKGROUND_THREADS)
        loaded, seconds, before = [], 0.0, traffic.answered
        for delta in results.deltas:
            began = time.monotonic()
            loaded.append(client.deltas.load(delta.name, delta.name))
            seconds += time.monotonic() - began
            known.append(delta.name)
            heard(loaded[-1])
            _until(traffic, traffic.answered + 1)  # loads are fast: let traffic pass between two of them
        traffic.while_loading = traffic.answered - before
        _until(traffic, traffic.answered + 2 * len(asked))  # so that the last deltas, too, are asked
    last = _last(client.server_info(steps=True).steps)
    answers = together(client, asked)
    info = client.server_info(steps=True)
    forwards = tuple(step for step in info.steps if step.index > last)
    return Outcome(tuple(loaded), seconds, traffic, answers, forwards, info)


def ask(client: Client, question: Question) -> Answered:
    began = time.monotonic()
    if question.deltas:
        result = client.generate(question.input, deltas=question.deltas, timeout=ANSWER_SECONDS)
    else:
        result = client.generate(question.input, backbone=True, timeout=ANSWER_SECONDS)
    return Answered(question, result.text, time.monotonic() - began, result.usage.output_tokens)


def together(client: Client, asked: Sequence[Question]) -> tuple[Answered, ...]:
    """All at once, each a call of its own; the server decides what becomes one batch."""
    line = threading.Barrier(len(asked))

    def one(question: Question) -> Answered:
        line.wait(10)
        return ask(client, question)

    with ThreadPoolExecutor(len(asked)) as pool:
        return tuple(pool.map(one, asked))


@contextmanager
def _traffic(client: Client, asked: Sequence[Question]) -> Iterator[tuple[Traffic, list[str]]]:
    """Threads that ask all the while: the bare backbone and, in turn, whichever deltas are `known` by then."""
    known: list[str] = []
    traffic, over, lock = Traffic(), threading.Event(), threading.Lock()
    turns = itertools.cycle(asked)

    def turn() -> Question:
        with lock:
            return next(question for question in turns if set(known).issuperset(question.deltas))

    def run() -> None:
        while not over.is_set():
            question = turn()
            try:
                answered = ask(client, question)
            except DeltaserveError as error:
                traffic.wrong.append(f"{question.who}: {error.message}")
                return
            with lock:
                traffic.answered += 1
                traffic.slowest = max(traffic.slowest, answered.seconds)
            if not answered.right:
                traffic.wrong.append(f"{question.who}: {question.input!r}: {answered.answer!r}")

    threads = [threading.Thread(target=run, name=f"background {n}", daemon=True) for n in range(BACKGROUND_THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield traffic, known
    finally:
        over.set()
        for thread in threads:
            thread.join(ANSWER_SECONDS + 5)


def _until(traffic: Traffic, answered: int, seconds: float = 5.0) -> None:
    """Waits until the background client has so many answers, within bounds."""
    end = time.monotonic() + seconds
    while traffic.answered < answered and time.monotonic() < end and not traffic.wrong:
        time.sleep(0.01)


def _last(steps: Sequence[Step]) -> int:
    return steps[-1].index if steps else -1
