"""Which tile sizes a launch takes, by its rows. All choices are listed, so that tests compile them all."""

from dataclasses import dataclass

from deltaserve_kernels.rowmap import RowMap


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
    """Regimes by rows per slot, rising; the last one has no end."""

    regimes: tuple[Regime, ...]

    def all(self) -> tuple[Tiles, ...]:
        return tuple(dict.fromkeys(regime.tiles for regime in self.regimes))

    def choose(self, rowmap: RowMap) -> Tiles:
        each = len(rowmap.order) / max(1, len(rowmap.active))
        return next(regime.tiles for regime in self.regimes if each <= regime.most)


LOW_RANK = Table(
    (
        Regime(2, Tiles(m=1, n=128, r=16, k=256, split=8, warps=4)),
        Regime(64, Tiles(m=16, n=64, r=32, k=64, split=8, warps=4)),
        Regime(float("inf"), Tiles(m=64, n=64, r=16, k=64, split=2, warps=4)),
    )
)

ACTIVATED = Table(
    (
        Regime(2, Tiles(m=1, n=128, r=16, k=256, split=8, warps=4)),
        Regime(64, Tiles(m=16, n=64, r=16, k=64, split=8, warps=4)),
        Regime(float("inf"), Tiles(m=64, n=64, r=16, k=64, split=2, warps=4)),
    )
)
"""How a bottleneck expands what LOW_RANK's tiles have shrunk: m and split are the same."""

DENSE = Table(
    (
        Regime(2, Tiles(m=1, n=32, r=0, k=256, split=1, warps=4)),
        Regime(32, Tiles(m=16, n=64, r=0, k=32, split=1, warps=4)),
        Regime(float("inf"), Tiles(m=64, n=64, r=0, k=32, split=1, warps=4)),
    )
)

BLOCK = Table(
    (
        Regime(2, Tiles(m=1, n=256, r=0, k=0, split=1, warps=4)),
        Regime(float("inf"), Tiles(m=16, n=32, r=0, k=0, split=1, warps=4)),
    )
)
