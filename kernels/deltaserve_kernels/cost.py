"""What each primitive costs at least: bytes of device memory that its kernels must move, and floating point operations.

Counted once are every row, every number of a delta that some row of the forward uses, and every partial sum: what one
kernel reads twice it finds in the cache. Maps of rows, tiles and boards are not counted. Attention: `attention.cost`.
"""

from dataclasses import dataclass

import torch

from deltaserve_kernels.affine import AffineTable
from deltaserve_kernels.block import BlockTable
from deltaserve_kernels.bottleneck import BottleneckTable
from deltaserve_kernels.dense import DenseTable
from deltaserve_kernels.fusion import FusionTable
from deltaserve_kernels.lowrank import LowRankTable
from deltaserve_kernels.ownnorm import NormTable
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.rows import RowsTable
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.sparse import SparseTable

_FP32 = 4


@dataclass(frozen=True)
class Cost:
    """`read` and `written` in bytes, `flops` with a multiplication and an addition counted as two."""

    read: int
    written: int
    flops: int

    @property
    def moved(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.read * times, self.written * times, self.flops * times)


NOTHING = Cost(0, 0, 0)


def linear(rows: int, inputs: int, outputs: int, size: int) -> Cost:
    """The backbone's own product, of elements of `size` bytes: y = x Wᵀ."""
    return Cost((rows * inputs + inputs * outputs) * size, rows * outputs * size, 2 * rows * inputs * outputs)


def low_rank(rowmap: RowMap, table: LowRankTable, size: int, split: int = 1) -> Cost:
    """y += scale · outer ⊙ (x Aᵀ D Bᵀ), y in fp32, x of `size` bytes an element; h is written in `split` planes.

    flops = 2 · rows · rank · (in + out), without D and outer.
    """
    total, turned = NOTHING, any(entry.tensors[2] is not None for _, entry in table.entries(rowmap))
    for rows, entry in _users(rowmap, table):
        a, b, inner, _ = entry.tensors
        assert a is not None and b is not None
        rank, inputs, outputs = int(a.shape[0]), int(a.shape[1]), int(b.shape[0])
        hidden = rows * rank * _FP32
        products = 2 * rows * rank * (inputs + outputs)
        total += Cost(
            rows * (inputs * size + outputs * _FP32) + hidden * (split + turned),
            rows * outputs * _FP32 + hidden * (split + turned),
            products + (2 * rows * rank * rank if inner is not None and inner.ndim == 2 else 0),
        )
    return total + _deltas(rowmap, table)


def bottleneck(rowmap: RowMap, table: BottleneckTable, size: int, split: int = 1) -> Cost:
    """y += gate · (scale · f(u Downᵀ + down_bias) Upᵀ + up_bias), y and gates in fp32, u of `size` bytes an element.

    A norm in front is `own_norm`'s, of u in fp32.
    """
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        down, up = entry.tensors[:2]
        assert down is not None and up is not None
        width, inputs, outputs = int(down.shape[0]), int(down.shape[1]), int(up.shape[0])
        hidden = rows * width * _FP32 * split
        total += Cost(
            rows * (inputs * size + outputs * _FP32 + _FP32) + hidden,
            rows * outputs * _FP32 + hidden,
            2 * rows * width * (inputs + outputs),
        )
    return total + _deltas(rowmap, table)


def own_norm(rowmap: RowMap, table: NormTable) -> Cost:
    """(y − mean) / √(var + eps) ⊙ weight + bias in place, y in fp32."""
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        weight = entry.tensors[0]
        assert weight is not None
        moved = rows * int(weight.shape[0])
        total += Cost(moved * _FP32, moved * _FP32, 7 * moved)
    return total + _deltas(rowmap, table)


def fusion(rowmap: RowMap, table: FusionTable, width: int, size: int) -> Cost:
    """y += (Σ_k p_k u_k) Valueᵀ, y and u_k in fp32, what asks of `size` bytes an element; without keys of slots."""
    total = dense(rowmap, table.query, size) + dense(rowmap, table.value, _FP32)
    for rows, entry in _users(rowmap, table):
        row, count, valued = rows * width * _FP32, int(entry.scalars[0]), entry.tensors[3] is not None
        total += Cost(row * (1 + count + (not valued)), row, 4 * rows * width * count)
    return total


def dense(rowmap: RowMap, table: DenseTable, size: int) -> Cost:
    """y (+)= x Wᵀ + b, y in fp32; rows of a slot that replaces are not read."""
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        weight = entry.tensors[0]
        assert weight is not None
        outputs, inputs = weight.shape
        added = 0 if entry.scalars[0] else rows * outputs * _FP32
        total += Cost(rows * inputs * size + added, rows * outputs * _FP32, 2 * rows * inputs * outputs)
    return total + _deltas(rowmap, table)


def outputs(rowmap: RowMap, table: RowsTable, size: int) -> Cost:
    """y[:, index] = x valuesᵀ, y in fp32."""
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        values = entry.tensors[1]
        assert values is not None
        count, inputs = values.shape
        total += Cost(rows * inputs * size, rows * count * _FP32, 2 * rows * count * inputs)
    return total + _deltas(rowmap, table)


def sparse(rowmap: RowMap, table: SparseTable, outputs: int, size: int) -> Cost:
    """y += x Sᵀ, y in fp32: of x the inputs that S has, of S a place, a number in fp32 and where each output begins."""
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        index, values = entry.tensors
        assert index is not None and values is not None
        places = int(values.shape[0])
        used = places if index.device.type == "meta" else int(index[1].unique().shape[0])
        total += Cost(
            rows * (min(used, places) * size + outputs * _FP32) + places * 2 * _FP32 + outputs * _FP32,
            rows * outputs * _FP32,
            2 * rows * places,
        )
    return total


def block(rowmap: RowMap, table: BlockTable, width: int, size: int) -> Cost:
    """Rows of `size` bytes an element, from one place to another, times blocks."""
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        blocks = entry.tensors[0]
        assert blocks is not None
        total += Cost(rows * width * size, rows * width * size, 2 * rows * width * int(blocks.shape[1]))
    return total + _deltas(rowmap, table)


def scale_input(rowmap: RowMap, table: AffineTable, size: int) -> Cost:
    """x ⊙ in_scale in place."""
    return _elementwise(rowmap, table, slice(0, 1), size)


def scale_output(rowmap: RowMap, table: AffineTable) -> Cost:
    """y ⊙ scale + shift in place, y in fp32."""
    return _elementwise(rowmap, table, slice(1, 3), _FP32)


def looked_up(rows: int, width: int, size: int) -> Cost:
    """Rows of an embedding, of a soft prompt or of a delta's own embedding, each to its place."""
    return Cost(rows * width * size, rows * width * size, 0)


def _elementwise(rowmap: RowMap, table: AffineTable, columns: slice, size: int) -> Cost:
    total = NOTHING
    for rows, entry in _users(rowmap, table):
        vectors = [t for t in entry.tensors[columns] if t is not None]
        if vectors:
            moved = rows * int(vectors[0].shape[0])
            total += Cost(moved * size + sum(_bytes(t) for t in vectors), moved * size, moved * len(vectors))
    return total


def _users(rowmap: RowMap, table: SlotTable) -> list[tuple[int, Entry]]:
    """What each slot of the forward has, and how many rows it has."""
    counts: dict[int, int] = {}
    for run, _ in table.entries(rowmap):
        counts[run.slot] = counts.get(run.slot, 0) + run.rows
    return [(rows, table.items()[slot]) for slot, rows in counts.items()]


def _deltas(rowmap: RowMap, table: SlotTable) -> Cost:
    """Every tensor that a slot of the forward has, once, whoever else has it too."""
    found: dict[object, torch.Tensor] = {}
    for _, entry in _users(rowmap, table):
        for tensor in entry.tensors:
            if tensor is not None:
                key = id(tensor) if tensor.device.type == "meta" else (tensor.data_ptr(), tensor.shape)
                found[key] = tensor
    return Cost(sum(_bytes(t) for t in found.values()), 0, 0)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
