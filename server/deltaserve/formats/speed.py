"""How long costly work takes on this machine: amounts by kind of operation, and seconds for each, measured once."""

import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

_SIDE = 512
_PLACES = 1 << 21
_LARGE = 1 << 23
"""Numbers in 32 MiB: glibc keeps no block of that size, and new pages cost more than what is done to them."""
_PASSES = 4
"""What `_swept` comes to."""


@dataclass(frozen=True)
class Cost:
    """Amounts of work. Floating-point operations, but of the last ones: numbers of matrices that pass through memory
    once, numbers put in random order, and numbers times the logarithm of their count.
    """

    product: float = 0.0
    svd: float = 0.0
    qr: float = 0.0
    solve: float = 0.0  # in float64
    sweep: float = 0.0
    large: float = 0.0  # a sweep, where a matrix is so large that each one is memory that the system gives anew
    shuffle: float = 0.0
    fourier: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        """Of one core; 0 for nothing, which measures nothing."""
        if self == Cost():
            return 0.0
        each = rates()
        return math.fsum(getattr(self, f.name) * each[f.name] for f in fields(self))


def product(rows: int, inner: int, columns: int) -> Cost:
    """[rows, inner] times [inner, columns]."""
    return Cost(product=2.0 * rows * inner * columns)


def svd(rows: int, columns: int) -> Cost:
    """Thin, by divide and conquer, as LAPACK's gesdd counts: 14 M m² + 8 m³."""
    least, most = sorted((rows, columns))
    return Cost(svd=14.0 * most * least**2 + 8.0 * least**3)


def qr(rows: int, columns: int) -> Cost:
    """Thin, Q made explicit: 4 M m² − 4/3 m³."""
    least, most = sorted((rows, columns))
    return Cost(qr=4.0 * most * least**2 - 4 / 3 * least**3)


def solve(side: int, columns: int, count: int = 1) -> Cost:
    """`count` systems [side, side] for so many right sides: 2/3 n³ + 2 n² c each."""
    return Cost(solve=count * (2 / 3 * side**3 + 2.0 * side**2 * columns))


def sweep(passes: float, numbers: int) -> Cost:
    """So many passes over a matrix of so many numbers."""
    return Cost(**{"large" if numbers >= _LARGE else "sweep": float(passes) * numbers})


def shuffle(numbers: int) -> Cost:
    return Cost(shuffle=float(numbers))


def fourier(numbers: int) -> Cost:
    return Cost(fourier=numbers * math.log2(max(numbers, 2)))


def rates() -> Mapping[str, float]:
    """Seconds for one unit of each of `Cost`'s fields. Measured by whoever asks first, in about a second.

    For as long as the process lives they stay as they are: what was accepted once is not refused later.
    """
    with _LOCK:
        return _measured()


_LOCK = threading.Lock()


@functools.cache
def _measured() -> Mapping[str, float]:
    random = torch.Generator().manual_seed(0)
    square = torch.randn(_SIDE, _SIDE, generator=random)
    double = square.double() + _SIDE * torch.eye(_SIDE, dtype=torch.float64)
    long = torch.randn(_PLACES, generator=random)
    table = long[: 1 << 20].view(1024, 1024)
    samples: Mapping[str, tuple[Cost, Callable[[], object]]] = {
        "product": (product(_SIDE, _SIDE, _SIDE), lambda: square @ square),
        "svd": (svd(_SIDE, _SIDE), lambda: torch.linalg.svd(square, full_matrices=False)),
        "qr": (qr(_SIDE, _SIDE), lambda: torch.linalg.qr(square)),
        "solve": (solve(_SIDE, _SIDE), lambda: torch.linalg.solve(double, double)),
        "sweep": (sweep(_PASSES, _PLACES), lambda: _swept(long)),
        "large": (sweep(_PASSES, _LARGE), lambda: _swept(torch.ones(1).expand(_LARGE))),
        "shuffle": (shuffle(_PLACES), lambda: torch.randperm(_PLACES, generator=random)),
        "fourier": (fourier(table.numel()), lambda: torch.fft.ifft2(table)),
    }
    assert samples.keys() == {f.name for f in fields(Cost)}
    return {name: _least(work) / getattr(cost, name) for name, (cost, work) in samples.items()}


def _swept(numbers: torch.Tensor) -> bool:
    """What is done to the numbers of most lowerings: they are made out of others, and looked at."""
    return bool(torch.isfinite(numbers * 2).all())


def _least(work: Callable[[], object]) -> float:
    """The shortest of five, in this thread's own time: what else the machine does is not counted."""
    found = math.inf
    for _ in range(5):
        start = time.thread_time()
        work()
        found = min(found, time.thread_time() - start)
    return found
