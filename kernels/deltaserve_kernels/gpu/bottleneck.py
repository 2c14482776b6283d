"""Bottleneck as LowRank's two kernels: expand activates what shrink gave, and adds what is behind a gate.

The activation is made anew for each part of the outputs: that is less than a third launch, and less than the weights
that a part reads.
"""

import torch

from deltaserve_kernels.gpu import demands, lowrank
from deltaserve_kernels.gpu.board import KINDS, Board, bits
from deltaserve_kernels.gpu.tuning import ACTIVATED
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import Entry, SlotTable


def row(slot: int, entry: Entry, inputs: int, outputs: int) -> tuple[int, ...]:
    """A slot's row of the board, columns as LowRank's.

    up_bias is where outer is, down_bias in inner's place, and the activation's number in that of inner's dimensions.
    """
    down = demands.tensor("down", slot, entry.tensors[0], (None, inputs), strided=True)
    width = down.shape[0]
    up = demands.tensor("up", slot, entry.tensors[1], (outputs, width), strided=True)
    between = _vector("down_bias", slot, entry.tensors[2], width)
    behind = _vector("up_bias", slot, entry.tensors[3], outputs)
    places = (down.data_ptr(), up.data_ptr(), width, down.stride(0), up.stride(0))
    scale, activation = entry.scalars
    return (KINDS[down.dtype], *places, bits(scale), *behind, *between, int(activation), KINDS[up.dtype])


def _vector(name: str, slot: int, given: torch.Tensor | None, width: int) -> tuple[int, int]:
    if given is None:
        return (0, 0)
    found = demands.tensor(name, slot, given, (width,))
    return (found.data_ptr(), KINDS[found.dtype])


def launch(y: torch.Tensor, u: torch.Tensor, rowmap: RowMap, table: SlotTable, gates: torch.Tensor | None) -> None:
    """y += gate · (scale · f(u Downᵀ + down_bias) Upᵀ + up_bias) in place. y [rows, out], u [rows, d].

    Raises ValueError, before anything is launched, where rows, a slot or what it has cannot be read so.
    """
    demands.rows(rowmap, table, y=y, u=u)
    if gates is None:
        gates = rowmap.kept.get(("ones", 0))
        if gates is None:
            gates = rowmap.kept["ones", 0] = torch.ones(rowmap.rows, device=rowmap.device)
    elif gates.shape != (rowmap.rows,) or gates.dtype != torch.float32 or not gates.is_contiguous():
        raise ValueError(f"gates: {gates.dtype} {tuple(gates.shape)}; read is one float32 a row")
    board = Board.of(table, lowrank.COLUMNS, row, u.shape[1], y.shape[1]).rows()
    entries = [entry for _, entry in table.entries(rowmap)]
    planes = lowrank.shrunk(u, rowmap, board, entries)
    lowrank.expanded(y, rowmap, board, planes, ACTIVATED.choose(rowmap), entries, gates)
