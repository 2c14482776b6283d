"""The same requests of several tasks by one deltaserve, by full fine-tuned copies and by PEFT, in a closed loop."""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bench import contenders, shapes, tasks
from bench.answers import Answers, apart, moved
from bench.clock import Variant, interleaved, ratios
from bench.contenders import BARE, BESIDE, COPIES, OURS, PEFT_MIXED, PEFT_SET, SWAP, Contender
from bench.plain import Copy
from bench.quiet import Others
from bench.rows import Row, Spread
from bench.served import Served
from bench.tasks import Asked
from deltaserve.backbone.load import DTYPES
from deltaserve.deltas.delta import Delta

KEYS = ("work", "kind", "popularity", "tasks", "variant")
"""The parameters that tell the rows apart."""
VARIANTS = (BARE, OURS, COPIES, BESIDE, SWAP, PEFT_MIXED, PEFT_SET)
EXACT = 1e-5
MOVED = 1e-3
"""Error ratio that a task makes at least, of every request: what does nothing costs nothing."""
SHARE = 0.6
"""Of the memory that is free at the start: what copies may take."""
_COUNTS, _SOME = (1, 2, 5, 10, 32), 10
_POOL_SPARE = 64 << 20


@dataclass(frozen=True)
class Case:
    """`count` tasks; `tokens` of each input. `generate`: tokens of each answer (0: encode); all but the first timed."""

    shape: str
    kind: str
    popularity: str
    count: int
    requests: int
    tokens: int
    generate: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.work}, {self.kind}, {self.popularity}, {self.count} tasks"

    @property
    def work(self) -> str:
        return "decode" if self.generate else "encode"

    @property
    def parameters(self) -> dict[str, str | int | float | bool]:
        return {
            "shape": self.shape, "work": self.work, "dtype": "float32", "requests": self.requests,
            "tokens": self.tokens, "generate": self.generate, "kind": self.kind, "popularity": self.popularity,
            "tasks": self.count,
        }  # fmt: skip


def cases(room: int, *, quick: bool = False, tiny: bool = False) -> tuple[Case, ...]:
    """`room`: bytes that copies may take; as many copies as that holds are a case of their own.

    Kinds are compared for ten tasks, as popularities are, and numbers of tasks for LoRA and for all kinds mixed. `tiny`
    is for trying the bench out, not for figures.
    """
    bert, llama = ("tiny-bert", "tiny-llama") if tiny else ("bert-base", "llama-24")
    found = []
    for shape, requests, tokens, generate, rounds in (
        (bert, 16, 64, 0, 5),
        (llama, 32, *((8, 5) if quick else (16, 9)), 3),
    ):
        if tiny:
            sets = [(tasks.LORA, "zipf-1.5", 5), (tasks.MIXED, "distinct", 6)]
        elif quick:
            sets = [(tasks.LORA, "distinct", 5 if generate else _SOME)]
        else:
            counts = sorted({*_COUNTS, min(fitting(shape, room), _COUNTS[-1])} - {0})
            sets = [(kind, "distinct", count) for kind in (tasks.LORA, tasks.MIXED) for count in counts]
            sets += [(kind, "distinct", _SOME) for kind in tasks.KINDS if kind not in (tasks.LORA, tasks.MIXED)]
            others = [name for name in tasks.POPULARITIES if name != "distinct"]
            sets += [(kind, name, _SOME) for kind in (tasks.LORA, tasks.MIXED) for name in others]
        few = 2 if tiny or quick else rounds
        found += [Case(shape, *chosen, requests, tokens, generate, few) for chosen in sets]
    return tuple(found)


def variants(case: Case) -> tuple[str, ...]:
    """What there is for a case, whether or not copies fit: PEFT mixes LoRA alone."""
    alone = () if case.kind == tasks.LORA else (PEFT_MIXED, PEFT_SET)
    return tuple(name for name in VARIANTS if name not in alone)


def fitting(shape: str, room: int) -> int:
    """Whole copies in so many bytes."""
    return room // shapes.nbytes(shape, torch.float32)


def run(case: Case, room: int, seed: int, advance: Callable[[], object]) -> list[Row]:
    """Measures one case: a row for each variant. All answers are compared with those of one merged copy before."""
    ready = _ready(case.shape, seed)
    spec = ready.pair.ours.spec
    held = tasks.of_kind(case.kind, case.count, spec, seed)
    drawn = tasks.drawn(case.popularity, case.requests, case.count, seed)
    asked = tasks.asked(spec, case.requests, case.tokens, case.generate, drawn, seed)
    longer = case.tokens + (tasks.VIRTUAL if case.kind == tasks.PROMPT else 0)
    bare = tasks.asked(spec, case.requests, longer, case.generate, [-1] * case.requests, seed)
    unchanged = Asked(asked.ids, bare.tasks, asked.generate)
    fit = fitting(case.shape, room)
    with ExitStack() as stack:
        served = stack.enter_context(Served(ready.pair.ours, held, _POOL_SPARE + _pool(held)))
        found = [contenders.deltaserve(BARE, served, bare), contenders.deltaserve(OURS, served, asked)]
        if case.count <= fit:
            fleet = ready.fleet(held)
            found += [contenders.copies(fleet, asked), stack.enter_context(contenders.beside(fleet, asked))]
        found.append(contenders.swapped(ready.one, held, asked))
        if case.kind == tasks.LORA:
            model = contenders.in_peft(case.shape, ready.pair, held)
            found += [contenders.peft_mixed(model, asked), contenders.peft_set(model, asked)]
        errors = _errors(case, found, contenders.deltaserve(BARE, served, unchanged))
        timed = [Variant(each.name, _timed(each.run), _before(each.begin)) for each in found]
        with Others() as others:
            seconds = interleaved(timed, case.rounds, ready.pair.ours.device, seed, advance, warm=False)
        nbytes = _nbytes(case, served)
    left = f"{fit} of {case.count} copies fit in the {room / 1e9:.3g} GB that they may take"
    return [
        Row(
            name="copies",
            outcome="left out" if name not in seconds else "wrong" if errors.get(name, 0.0) > EXACT else "measured",
            parameters={**case.parameters, "variant": name},
            seconds=Spread.of(seconds[name]) if name in seconds else None,
            ratio=Spread.of(ratios(seconds[name], seconds[OURS])) if name in seconds else None,
            against=OURS,
            error_ratio=errors.get(name),
            limit=EXACT if name in errors else None,
            nbytes=nbytes.get(name) if name in seconds else None,
            others=others.cores,
            note="" if name in seconds else left,
        )
        for name in variants(case)
    ]


def _errors(case: Case, found: Sequence[Contender], bare: Contender) -> dict[str, float]:
    """Of each but the bare backbone, against one merged copy."""
    answers = {each.name: _answers(each) for each in found if each.name != BARE}
    least = moved(answers[SWAP], _answers(bare))
    assert least >= MOVED, f"{case}: a task moves its answer by {least:.1e} only"
    return {name: apart(each, answers[SWAP]) for name, each in answers.items() if name != SWAP}


def _answers(contender: Contender) -> Answers:
    contender.begin(True)
    return contender.run(True)


def _timed(run: Callable[[bool], Answers]) -> Callable[[], object]:
    return lambda: run(False)


def _before(begin: Callable[[bool], None]) -> Callable[[], None]:
    return lambda: begin(False)


def _pool(held: Sequence[Delta]) -> int:
    """With alignment of each tensor."""
    return sum(delta.nbytes + 256 * sum(1 for _ in delta.tensors()) for delta in held)


def _nbytes(case: Case, served: Served) -> dict[str, int]:
    """Of deltas, or of whole models, that hold the tasks."""
    one = shapes.nbytes(case.shape, torch.float32)
    return {OURS: served.nbytes, COPIES: case.count * one, BESIDE: case.count * one, SWAP: 2 * one}


class _Ready:
    """What cases of one shape share: it takes longer to make than to measure."""

    def __init__(self, shape: str, seed: int) -> None:
        self._shape = shape
        self.pair = shapes.twins(shape, DTYPES["float32"], torch.device("cpu"), seed)
        self.one = Copy(shape, self.pair)
        self._fleet: list[Copy] = []

    def fleet(self, held: Sequence[Delta]) -> list[Copy]:
        """A model with all weights of its own for each task."""
        self._fleet += [Copy(self._shape, self.pair) for _ in range(len(held) - len(self._fleet))]
        for model, delta in zip(self._fleet, held, strict=False):
            model.take(delta)
        return self._fleet[: len(held)]


@functools.lru_cache(maxsize=1)
def _ready(shape: str, seed: int) -> _Ready:
    return _Ready(shape, seed)
