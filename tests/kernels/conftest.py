"""Rows with slots, for every popularity of deltas. Triton's kernels run in its interpreter."""

import os
from collections.abc import Callable

import pytest
import torch

from deltaserve_kernels.dispatch import Implementation
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.testing import POPULARITIES, popularity

CPU = torch.device("cpu")
# Read when kernels are defined, which is when the first launcher is asked for.
os.environ["TRITON_INTERPRET"] = "1"


SELDOM = ("identical", "distinct", "zipf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter is slow: without the long tests it runs the popularities that have most in them."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("implementation") is Implementation.TRITON and params.get("spread") in SELDOM:
            item.add_marker(pytest.mark.long)


@pytest.fixture
def steps(implementation: Implementation) -> float:
    """How many halves of a last bit a rounded number may be off: the interpreter cuts bfloat16 where GPUs round."""
    return 2.0 if implementation is Implementation.TRITON else 1.0


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


@pytest.fixture(params=POPULARITIES)
def spread(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(Implementation), ids=lambda i: i.value)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    found: Implementation = request.param
    return found


@pytest.fixture
def rows_of() -> Callable[[str, int, int], tuple[RowMap, list[int]]]:
    """A RowMap and each row's slot, for 11 requests of 1 to `longest` rows over 5 slots."""

    def make(spread: str, longest: int, seed: int = 0) -> tuple[RowMap, list[int]]:
        slots = popularity(spread, 11, 5, seed)
        counts = [1 + (i * 7) % longest for i in range(11)]
        each = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
        return RowMap.of(zip(slots, counts, strict=True), CPU), each

    return make
