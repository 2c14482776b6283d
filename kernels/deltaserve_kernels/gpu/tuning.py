"""Which tile sizes a launch takes, by its rows and by the chip. All choices are listed, so that tests compile them all.

They stand in tuning.json: `default` was chosen by hand and by what compiles without spills; a chip's own, by the name
of its architecture, are what `python -m bench tune` found on one.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from deltaserve_kernels.rowmap import RowMap

DEFAULT = "default"
FILE = "tuning.json"


@dataclass(frozen=True)
class Tiles:
    """m rows, n outputs, r ranks, k inputs at a time; the sum over inputs in `split` parts."""

    m: int
    n: int
    r: int
    k: int
    split: int
    warps: int


@dataclass(frozen=True)
class Regime:
    """`most`: rows for each slot, on average, up to which it holds."""

    most: float
    tiles: Tiles


@dataclass(frozen=True)
class Table:
    """Regimes by rows per slot, rising; the last one has no end. `tuned`: those of a chip that has its own."""

    regimes: tuple[Regime, ...]
    tuned: Mapping[str, tuple[Regime, ...]] = field(default_factory=dict)

    def of(self, architecture: str) -> tuple[Regime, ...]:
        return self.tuned.get(architecture, self.regimes)

    def all(self, architecture: str | None = None) -> tuple[Tiles, ...]:
        """What launches may choose on a chip, or on any."""
        regimes = (
            self.of(architecture) if architecture else (*self.regimes, *(r for t in self.tuned.values() for r in t))
        )
        return tuple(dict.fromkeys(regime.tiles for regime in regimes))

    def choose(self, rowmap: RowMap) -> Tiles:
        regimes = _tried.get().get(id(self)) or self.of(architecture(rowmap.device))
        each = len(rowmap.order) / max(1, len(rowmap.active))
        return next(regime.tiles for regime in regimes if each <= regime.most)

    @contextmanager
    def trying(self, number: int, tiles: Tiles) -> Iterator[None]:
        """Regime `number` takes these tiles, in this thread; for tuning and tests."""
        regimes = list(self.regimes)
        regimes[number] = replace(regimes[number], tiles=tiles)
        token = _tried.set({**_tried.get(), id(self): tuple(regimes)})
        try:
            yield
        finally:
            _tried.reset(token)


_tried: ContextVar[Mapping[int, tuple[Regime, ...]]] = ContextVar("deltaserve_tiles", default={})  # noqa: B039


@lru_cache
def architecture(device: torch.device) -> str:
    """As `triton` names it: sm_90, gfx942; DEFAULT where kernels are interpreted."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def read(text: str) -> Mapping[str, Table]:
    """Tables by the name of their kernel. A regime without an end has `most` null."""
    found: Mapping[str, Mapping[str, list[dict[str, Any]]]] = json.loads(text)
    tables = {}
    for name, chips in found.items():
        every = {chip: tuple(_regime(one) for one in regimes) for chip, regimes in chips.items()}
        tables[name] = Table(every.pop(DEFAULT), every)
    return tables


def written(tables: Mapping[str, Table]) -> str:
    """What `read` reads."""
    found = {
        name: {
            chip: [_told(one) for one in regimes] for chip, regimes in {DEFAULT: table.regimes, **table.tuned}.items()
        }
        for name, table in tables.items()
    }
    return json.dumps(found, indent=1) + "\n"


def _regime(told: Mapping[str, Any]) -> Regime:
    most = told["most"]
    return Regime(float("inf") if most is None else float(most), Tiles(**told["tiles"]))


def _told(regime: Regime) -> dict[str, Any]:
    return {"most": None if regime.most == float("inf") else regime.most, "tiles": asdict(regime.tiles)}


TABLES = read(files(__package__).joinpath(FILE).read_text())
LOW_RANK, DENSE, BLOCK = TABLES["low rank"], TABLES["dense"], TABLES["block"]
ACTIVATED = TABLES["activated"]
"""How a bottleneck expands what LOW_RANK's tiles have shrunk: m and split are the same, on every chip."""
