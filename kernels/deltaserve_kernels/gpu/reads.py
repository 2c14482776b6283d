"""Reads: which tile sizes attention takes, by the width of its heads. All choices are listed, so tests compile all."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

PART = 512
"""Keys that one program reads of a sequence whose rows are one tile. Whoever else is in the batch, so that its sums
have one order."""


@dataclass(frozen=True)
class Reads:
    """m rows (queries times heads of a group), n keys at a time; rows in fp32 are multiplied c of their width at a
    time."""

    m: int
    n: int
    c: int
    warps: int


@dataclass(frozen=True)
class ReadsTable:
    """By the width of heads, a power of two: for few rows each sequence, for many, many with a bias, rows in fp32."""

    few: Mapping[int, Reads]
    many: Mapping[int, Reads]
    biased: Mapping[int, Reads]
    fp32: Mapping[int, Reads]

    def choose(self, each: float, width: int, fp32: bool, biased: bool) -> Reads:
        """For `each` rows a sequence, on average."""
        padded = max(min(self.few), 1 << (width - 1).bit_length())
        many = self.biased if biased else self.many
        return (self.fp32 if fp32 else self.few if each <= self.few[padded].m else many)[padded]


_FEW = Reads(m=16, n=64, c=32, warps=4)
_MANY = Reads(m=64, n=64, c=32, warps=4)
_MANY_WIDE = Reads(m=64, n=32, c=32, warps=8)
# No tensor core multiplies fp32 rows exactly: threads do, and hold what they multiply in registers.
_FP32 = Reads(m=16, n=16, c=32, warps=4)
ATTENTION = ReadsTable(
    few={64: _FEW, 128: _FEW, 256: replace(_FEW, n=32)},
    many={64: _MANY, 128: _MANY, 256: _MANY_WIDE},
    # Distances take registers, of which 128 threads have too few here.
    biased={64: _MANY, 128: replace(_MANY, warps=8), 256: _MANY_WIDE},
    fp32={64: _FP32, 128: _FP32, 256: replace(_FP32, warps=8)},
)
