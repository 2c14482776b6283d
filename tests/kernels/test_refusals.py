"""What launchers are given wrongly is refused by name before anything runs: rows, slots, and what slots have."""

import re
from collections.abc import Callable

import pytest
import torch

from deltaserve_kernels import affine, block, bottleneck, dense, fusion, lowrank, ownnorm, rows, sparse
from deltaserve_kernels.dispatch import Implementation, forced
from deltaserve_kernels.gpu.lowrank import MOST_RANK
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable
from deltaserve_kernels.testing import poisoned

CPU = torch.device("cpu")
IN, OUT, SLOTS = 12, 8, 3
INDEX = torch.tensor([1, 5], dtype=torch.int32)
PLACES = torch.tensor([[0, 3], [4, 2]], dtype=torch.int32)

Call = Callable[[torch.Tensor, torch.Tensor, RowMap, SlotTable], object]
KERNELS: dict[str, tuple[type[SlotTable], tuple[torch.Tensor | None, ...], tuple[float, ...], Call]] = {
    "lowrank": (lowrank.LowRankTable, (torch.ones(2, IN), torch.ones(OUT, 2), None, None), (1.0,), lowrank.apply),
    "bottleneck": (
        bottleneck.BottleneckTable, (torch.ones(2, IN), torch.ones(OUT, 2), torch.ones(2), torch.ones(OUT)), (1.0, 1.0),
        bottleneck.apply,
    ),
    "norm": (
        ownnorm.NormTable, (torch.ones(OUT), torch.ones(OUT)), (1e-5,), lambda y, _, m, t: ownnorm.apply(y, m, t),
    ),
    "dense": (dense.DenseTable, (torch.ones(OUT, IN), None), (0.0,), dense.apply),
    "rows": (rows.RowsTable, (INDEX, torch.ones(2, IN)), (), rows.replace_outputs),
    "sparse": (sparse.SparseTable, (PLACES, torch.ones(2)), (), sparse.apply),
    "affine in": (
        affine.AffineTable, (torch.ones(IN), None, None), (), lambda _, x, m, t: affine.scale_input(x, m, t),
    ),
    "affine out": (
        affine.AffineTable, (None, torch.ones(OUT), torch.ones(OUT)), (),
        lambda y, _, m, t: affine.scale_output(y, m, t),
    ),
    "block": (block.BlockTable, (torch.ones(3, 4, 4),), (), lambda _, x, m, t: block.turned(x, m, t)),
}  # fmt: skip
"""Each with a table, what slot 1 has there, and a call."""


def call(name: str, changed: Callable[..., tuple[object, ...]] = lambda y, x, m: (y, x, m), **entry: object) -> None:
    make, tensors, scalars, run = KERNELS[name]
    table = make(SLOTS, CPU)
    table.put(1, entry.get("tensors", tensors), scalars)
    y, x, rowmap = changed(torch.ones(4, OUT), torch.ones(4, IN), RowMap.of([(1, 3), (-1, 1)], CPU))
    with forced(Implementation.TRITON):
        run(y, x, rowmap, table)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype torch.float64": lambda t: t.double(),
    "dtype torch.int32": lambda t: t.int(),
    "strides (1, 4)": lambda t: t.T.contiguous().T,
    "3 rows; the map has 4": lambda t: t[:3],
    "8 rows; the map has 4": lambda t: torch.cat((t, t)),
}
READS = {"norm": "y", "affine out": "y", "affine in": "x", "block": "x"}
"""The others read both."""


def only(side: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., tuple[object, ...]]:
    return lambda y, x, m: (change(y), x, m) if side == "y" else (y, change(x), m)


@pytest.mark.parametrize(("name", "side"), [(name, side) for name in KERNELS for side in READS.get(name, "xy")])
@pytest.mark.parametrize("said", list(CHANGES))
def test_rows_that_cannot_be_read(name, side, said):
    with pytest.raises(ValueError, match=f"^({side}|out|u): .*{re.escape(said)}"):
        call(name, only(side, CHANGES[said]))


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize("slot", [SLOTS, SLOTS + 90, -2])
def test_slots_that_are_not_there(name, slot):
    """Beside one that is."""
    with pytest.raises(ValueError, match=f"^rowmap: slot {slot}; this table has slots 0 to {SLOTS - 1}"):
        call(name, lambda y, x, _: (y, x, RowMap.of([(1, 2), (slot, 2)], CPU)))


ENTRIES = {
    "A: of slot 1, shape (2, 13)": ("lowrank", (torch.ones(2, IN + 1), torch.ones(OUT, 2), None, None)),
    "A: of slot 1, dtype torch.float64": ("lowrank", (torch.ones(2, IN).double(), torch.ones(OUT, 2), None, None)),
    f"A: of slot 1, rank {MOST_RANK + 1}": (
        "lowrank", (torch.ones(MOST_RANK + 1, IN), torch.ones(OUT, MOST_RANK + 1), None, None),
    ),
    "B: of slot 1, shape (8, 3)": ("lowrank", (torch.ones(2, IN), torch.ones(OUT, 3), None, None)),
    "inner: of slot 1, shape (3,)": ("lowrank", (torch.ones(2, IN), torch.ones(OUT, 2), torch.ones(3), None)),
    "inner: of slot 1, shape (2, 3)": ("lowrank", (torch.ones(2, IN), torch.ones(OUT, 2), torch.ones(2, 3), None)),
    "outer: of slot 1, shape (9,)": ("lowrank", (torch.ones(2, IN), torch.ones(OUT, 2), None, torch.ones(9))),
    "down: of slot 1, shape (2, 11)": ("bottleneck", (torch.ones(2, IN - 1), torch.ones(OUT, 2), None, None)),
    "up: of slot 1, shape (8, 3)": ("bottleneck", (torch.ones(2, IN), torch.ones(OUT, 3), None, None)),
    "down_bias: of slot 1, shape (3,)": (
        "bottleneck", (torch.ones(2, IN), torch.ones(OUT, 2), torch.ones(3), None),
    ),
    "up_bias: of slot 1, dtype torch.int8": (
        "bottleneck", (torch.ones(2, IN), torch.ones(OUT, 2), None, torch.ones(OUT, dtype=torch.int8)),
    ),
    "bias: of slot 1, shape (9,)": ("norm", (torch.ones(OUT), torch.ones(OUT + 1))),
    "weight: of slot 1, shape (8, 11)": ("dense", (torch.ones(OUT, IN - 1), None)),
    "weight: of slot 1, dtype torch.int8": ("dense", (torch.ones(OUT, IN, dtype=torch.int8), None)),
    "weight: slot 1 has none": ("dense", (None, torch.ones(OUT))),
    "bias: of slot 1, shape (7,)": ("dense", (torch.ones(OUT, IN), torch.ones(OUT - 1))),
    "index: of slot 1, dtype torch.int64": ("rows", (INDEX.long(), torch.ones(2, IN))),
    "values: of slot 1, shape (3, 12)": ("rows", (INDEX, torch.ones(3, IN))),
    "index: of slot 1, 9 places": ("rows", (torch.arange(9, dtype=torch.int32), torch.ones(9, IN))),
    "index: of slot 1, shape (2,)": ("sparse", (INDEX, torch.ones(2))),
    "values: of slot 1, shape (3,)": ("sparse", (PLACES, torch.ones(3))),
    "in_scale: of slot 1, shape (13,)": ("affine in", (torch.ones(IN + 1), None, None)),
    "scale: of slot 1, dtype torch.float64": ("affine out", (None, torch.ones(OUT).double(), None)),
    "shift: of slot 1, shape (1, 8)": ("affine out", (None, None, torch.ones(1, OUT))),
    "blocks: of slot 1, shape (2, 4, 4)": ("block", (torch.ones(2, 4, 4),)),
    "blocks: of slot 1, shape (3, 4, 3)": ("block", (torch.ones(3, 4, 3),)),
    "blocks: of slot 1, shape (2, 5, 5)": ("block", (torch.ones(2, 5, 5),)),
    "blocks: of slot 1, shape (2, 2, 2, 2)": ("block", (torch.ones(2, 2, 2, 2),)),
    "blocks: of slot 1, shape (12,)": ("block", (torch.ones(12),)),
}  # fmt: skip


@pytest.mark.parametrize("said", list(ENTRIES))
def test_what_a_slot_has_is_read_only_where_it_fits(said):
    name, tensors = ENTRIES[said]
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        call(name, tensors=tensors)


@pytest.mark.parametrize("name", list(KERNELS))
def test_what_is_refused_is_refused_again_and_changes_nothing(name):
    """The first call that is right runs; a wrong entry that came later is refused each time, until it is gone."""
    make, tensors, scalars, run = KERNELS[name]
    table, rowmap = make(SLOTS, CPU), RowMap.of([(1, 4)], CPU)
    table.put(1, tensors, scalars)
    y, x = torch.ones(4, OUT), torch.ones(4, IN)
    with forced(Implementation.TRITON):
        run(y, x, rowmap, table)
        before = y.clone()
        last = [t for t in tensors if t is not None][-1]
        twice = {id(last): torch.cat((last, last), -1)}
        table.put(2, tuple(None if t is None else twice.get(id(t), t) for t in tensors), scalars)
        for _ in range(2):
            with pytest.raises(ValueError, match="of slot 2"):
                run(y, x, rowmap, table)
        assert torch.equal(y, before)
        table.drop(2)
        run(y, x, rowmap, table)


def fused(**changed: torch.Tensor) -> None:
    table = fusion.FusionTable(SLOTS, CPU)
    table.put(1, (None, None, None, None), (2.0,))
    given = {"y": torch.ones(4, OUT), "t": torch.ones(4, OUT), "members": torch.ones(4, 2, OUT)} | changed
    with forced(Implementation.TRITON):
        fusion.apply(*given.values(), RowMap.of([(1, 3), (-1, 1)], CPU), table)


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ("c|y: dtype torch.float64", {"y": torch.ones(4, OUT).double()}),
        ("asked: 3 rows; the map has 4", {"t": torch.ones(3, OUT)}),
        (r"(keys|members): torch.float32 \(3, 2, 8\)", {"members": torch.ones(3, 2, OUT)}),
        (r"(keys|members): torch.float16 \(4, 2, 8\)", {"members": torch.ones(4, 2, OUT).half()}),
    ],
)
def test_what_a_fusion_cannot_read(said, changed):
    fused()
    with pytest.raises(ValueError, match=f"^({said})"):
        fused(**changed)


def test_gates_are_one_number_a_row():
    make, tensors, scalars, run = KERNELS["bottleneck"]
    table = make(SLOTS, CPU)
    table.put(1, tensors, scalars)
    for gates in (torch.ones(3), torch.ones(4).half(), torch.ones(4, 1)):
        with forced(Implementation.TRITON), pytest.raises(ValueError, match=r"^gates: "):
            run(torch.ones(4, OUT), torch.ones(4, IN), RowMap.of([(1, 4)], CPU), table, gates)


@pytest.mark.long
def test_the_largest_rank_is_read():
    table = lowrank.LowRankTable(SLOTS, CPU)
    a, b = torch.zeros(MOST_RANK, IN), torch.zeros(OUT, MOST_RANK)
    a[-1], b[:, -1] = 1.0, 2.0
    table.put(0, (a, b), (0.5,))
    y = poisoned(2, OUT)
    y[0] = 0.0
    with forced(Implementation.TRITON):
        lowrank.apply(y, torch.ones(2, IN), RowMap.of([(0, 1), (-1, 1)], CPU), table)
    assert y[0].tolist() == [float(IN)] * OUT and y[1].isnan().all()
