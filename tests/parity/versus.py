"""Cases of another library in one engine with PEFT's deltas and the bare backbone, beside what the library answered."""

import random
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from driven import Driven, greedy, written
from families import FAMILIES
from methods import ENCODERS
from methods import cases as every
from oracle import Oracle, Recorded
from reference import answer, inputs

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve.errors import DeltaserveError
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
POOLINGS = (Pooling.MEAN, Pooling.CLS, Pooling.LAST)
FEW = ("lora-patterns", "ia3", "prefix", "oft")
BESIDE = (*FEW, "dora", "prompt", "shira", "ln-tuning", "lora-embedding", "loha")
"""PEFT's: those that it can do on a family stand in the same batch."""
LATEST = 9
"""Steps after which the last request joins: by then the first ones decode."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One request and the rows and tokens that it must bring."""

    name: str
    request: Request
    tokens: list[int]
    rows: torch.Tensor


class Versus:
    """An engine over a recorded backbone with these cases of its oracle, as far as they are lowered.

    `refused` has the errors of those that are not, by name.
    """

    def __init__(self, oracle: Oracle, folder: Path, names: Iterable[str], peft: Sequence[str] = BESIDE) -> None:
        self.oracle = oracle
        shutil.copytree(oracle.backbone, folder / "backbone")
        oracle.unpack(folder)
        task = FAMILIES[oracle.family].task
        cases = [case for case in every(oracle.family) if case.method in peft and case.task == task]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._models = written(oracle.family, cases, folder)
        # One forward has room for all that is asked.
        self.driven = Driven(folder, max_running=1024, max_batch_tokens=16384, kv_bytes=64 << 20)
        self.refused: dict[str, DeltaserveError] = {}
        for name in names:
            try:
                self.driven.lower(name, allow_pickle=True)
            except DeltaserveError as error:
                self.refused[name] = error
        for case in cases:
            self.driven.lower(case.name, case.wanted)

    @property
    def served(self) -> list[str]:
        peft = {case.name for case in self._models}
        return [name for name in self.driven.deltas if name not in peft]

    def asks(self, name: str) -> list[Asked]:
        """Every request that shows a case, or with `bare` the backbone."""
        reading = self.oracle.cases[name]["reading"] if name != "bare" else _bare(self.oracle.family)
        found = []
        for n, said in enumerate(self.oracle.answers(name)):
            known = {"ids": tuple(said.ids), "delta": self.driven.ref(None if name == "bare" else name)}
            if reading == "hidden":
                for pooling in POOLINGS:
                    request = Request(id=f"{name}/{n}/{pooling}", job=Job.EMBED, pooling=pooling, **known)
                    found.append(Asked(name, request, [], _pooled(name, said, pooling)))
            elif reading == "generate":
                sampling = greedy(len(said.tokens))
                request = Request(id=f"{name}/{n}", job=Job.GENERATE, sampling=sampling, **known)
                found.append(Asked(name, request, said.tokens, torch.log_softmax(said.rows, -1)))
            else:
                request = Request(id=f"{name}/{n}", job=Job.CLASSIFY, **known)
                found.append(Asked(name, request, [], said.rows))
        return found

    def beside(self) -> list[Asked]:
        """PEFT's deltas of the same batch, with what PEFT says to the first of their texts."""
        found = []
        for case, model in self._models.items():
            ids = inputs(case)[0]
            tokens, rows = answer(case, model, ids)
            known = {"id": case.name, "ids": tuple(ids), "delta": self.driven.ref(case.name)}
            if tokens:
                request = Request(job=Job.GENERATE, sampling=greedy(len(tokens)), **known)
            else:
                request = Request(job=Job.EMBED, pooling=Pooling.MEAN, **known)
            found.append(Asked(case.name, request, tokens, rows))
        return found

    def ratios(self, asked: Sequence[Asked], seed: int | None = None) -> dict[str, float]:
        """Each delta's worst error ratio, all in one batch; with a seed they join in another order, some later.

        Infinite where greedy tokens differ.
        """
        order, arrivals = list(asked), [0] * len(asked)
        if seed is not None:
            draw = random.Random(seed)
            draw.shuffle(order)
            arrivals = [draw.choice((0, 0, draw.randint(1, LATEST))) for _ in order]
        ours = self.driven.answers([one.request for one in order], arrivals)
        found: dict[str, float] = {}
        for one, (tokens, rows) in zip(order, ours, strict=True):
            ratio = error_ratio(rows, one.rows) if tokens == one.tokens else float("inf")
            found[one.name] = max(ratio, found.get(one.name, 0.0))
        return found

    def check_mixed(self) -> None:
        """All in one forward with PEFT's and the bare backbone's; then in another order, some when others decode."""
        asked = [one for name in self.served for one in self.asks(name)] + self.asks("bare") + self.beside()
        together = self.ratios(asked)
        steps = self.driven.engine.stats(steps=True).steps
        widest = max(steps, key=lambda step: step.sequences)
        assert widest.sequences == len(asked), "one forward held all of them"
        assert len(widest.deltas) == len(self.driven.deltas) >= 9 and len(set(widest.kinds)) >= 4
        assert not off(together), worst(off(together))
        later = self.ratios(asked, seed=len(asked))
        assert not off(later), worst(off(later))
        if self.oracle.family not in ENCODERS:
            since = self.driven.engine.stats(steps=True).steps[len(steps) :]
            assert any(step.phase == "mixed" for step in since), "some were prefilled while others decoded"

    def check_alone(self, names: Sequence[str]) -> None:
        """Each request by itself."""
        ratios = {name: max(self.ratios([one])[name] for one in self.asks(name)) for name in ("bare", *names)}
        assert not off(ratios), worst(off(ratios))

    def stop(self) -> None:
        assert self.driven.checksum() == self.driven.before, "the backbone was changed"
        self.driven.stop()


def off(found: Mapping[str, float]) -> dict[str, float]:
    return {name: ratio for name, ratio in found.items() if not ratio <= EXACT}


def worst(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {ratio:.1e}" for name, ratio in sorted(found.items(), key=lambda item: -item[1]))


def _bare(family: str) -> str:
    return "hidden" if FAMILIES[family].task == "FEATURE_EXTRACTION" else "generate"


def _pooled(name: str, said: Recorded, pooling: Pooling) -> torch.Tensor:
    """Of hidden states [prompt + n, width]: the mean leaves a prompt's rows out, the first row may be one of them."""
    match pooling:
        case Pooling.CLS:
            return said.rows[:1]
        case Pooling.LAST:
            return said.rows[-1:]
    prompt = len(said.rows) - len(said.ids)
    first = 1 if name == "prompt_after_bos" else 0
    return torch.cat((said.rows[:first], said.rows[first + prompt :])).mean(0, keepdim=True)
