"""What every bench leaves: rows of one schema, one JSON object a line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

Outcome = Literal["measured", "right", "wrong", "left out", "not yet"]


@dataclass(frozen=True)
class Spread:
    """The median of `samples` numbers, and their quartiles."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        low, _, high = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [numbers[0]] * 3
        return cls(median(numbers), low, high, len(numbers))


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    `seconds` is the time of one run; `ratio` that time over the one of the variant `against` in the same round, so what
    slows the whole machine for a while is in both; what is kept of a speed is the inverse, and `limit` what can be kept
    at most. `error_ratio` compares results with a reference and is right up to `limit`. `nbytes`: of the deltas on the
    device, or of the models that stand for them, together. `others`: cores that other processes kept busy meanwhile.
    `note` says why a row is left out.
    """

    name: str
    outcome: Outcome
    parameters: Mapping[str, str | int | float | bool]
    seconds: Spread | None = None
    ratio: Spread | None = None
    against: str | None = None
    error_ratio: float | None = None
    limit: float | None = None
    nbytes: int | None = None
    others: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Origin:
    """Where and of what rows are. `commit` ends in `+` where the tree differed from it. Bytes; `date` in UTC."""

    commit: str
    date: str
    seed: int
    versions: Mapping[str, str]
    cpu: str
    cores: int
    threads: int
    memory: int
    device: str


def write(file: Path, rows: Iterable[Row], origin: Origin, *, keep: bool = False) -> None:
    """Writes rows to `file`, instead of what was there; with `keep`, only instead of rows of the same parameters."""
    found = [json.loads(line) for line in file.read_text().splitlines()] if keep and file.is_file() else []
    by_key = {_key(row): row for row in found}
    by_key.update({_key(row): row for row in ({**asdict(row), "origin": asdict(origin)} for row in rows)})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in by_key.values()))


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps((row["name"], row["parameters"]), sort_keys=True)
