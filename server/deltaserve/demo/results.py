"""What was trained and how well it answers: the demo's `results.json`, one table in the manner of the paper's first."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "results.json"

Example = tuple[str, str]
"""A held-out sentence and its right answer."""


@dataclass(frozen=True)
class Outcome:
    """One training. `exact_match` is the share of held-out sentences answered word for word, greedily."""

    parameters: int
    steps: int
    seconds: float
    exact_match: float


@dataclass(frozen=True)
class BackboneOutcome:
    """`functions`: each function's exact match when the instruction stands before the sentence.

    `examples` are of those that it answers right, for the demo to show.
    """

    parameters: int
    steps: int
    batch: int
    seconds: float
    functions: dict[str, float]
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, told: dict[str, Any]) -> "BackboneOutcome":
        """From what `asdict` made of one, by way of JSON."""
        return cls(**{**told, "examples": tuple(map(_example, told["examples"]))})


@dataclass(frozen=True)
class DeltaOutcome:
    """One delta beside its references: the bare backbone, and full fine-tuning with as many steps, if it was done.

    `examples` are of those that the delta answers right, for the demo to show; the share of these is `exact_match`.
    """

    name: str
    chain: tuple[str, ...]
    method: str
    rate: float
    options: dict[str, Any]
    delta: Outcome
    full: Outcome | None
    backbone_exact_match: float
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, told: dict[str, Any]) -> "DeltaOutcome":
        """From what `asdict` made of one, by way of JSON."""
        read = {
            "chain": tuple(told["chain"]),
            "delta": Outcome(**told["delta"]),
            "full": told["full"] and Outcome(**told["full"]),
            "examples": tuple(map(_example, told["examples"])),
        }
        return cls(**{**told, **read})


@dataclass(frozen=True)
class CombinationOutcome:
    """Deltas on one request: the share of held-out sentences to which both tasks, or all, were done, by our server."""

    deltas: tuple[str, ...]
    chain: tuple[str, ...]
    exact_match: float
    examples: tuple[Example, ...]

    @classmethod
    def of(cls, told: dict[str, Any]) -> "CombinationOutcome":
        """From what `asdict` made of one, by way of JSON."""
        words = {"deltas": tuple(told["deltas"]), "chain": tuple(told["chain"])}
        return cls(**{**told, **words, "examples": tuple(map(_example, told["examples"]))})


@dataclass(frozen=True)
class Results:
    seed: int
    date: str
    versions: dict[str, str]
    threads: int
    held_out: int  # sentences that each exact match is over
    tuning_batch: int
    full_rate: float
    backbone: BackboneOutcome
    deltas: tuple[DeltaOutcome, ...]
    combinations: tuple[CombinationOutcome, ...] = ()
    note: str = ""  # what a reader of the numbers should know besides

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Results":
        told = json.loads((folder / FILE).read_text())
        backbone = BackboneOutcome.of(told.pop("backbone"))
        deltas = tuple(map(DeltaOutcome.of, told.pop("deltas")))
        combinations = tuple(map(CombinationOutcome.of, told.pop("combinations", ())))
        return cls(backbone=backbone, deltas=deltas, combinations=combinations, **told)


def _example(told: list[str]) -> Example:
    text, answer = told
    return text, answer
