"""Rows that enter the first layer: token embeddings, and soft-prompt rows in their places."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.lowrank import expanded
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

Piece = tuple[int, int, int, int]
"""(slot, row, offset, count): rows [row, row + count) are rows [offset, offset + count) of the slot's prompt."""


class PromptTable(SlotTable):
    """One column: the soft prompt's rows [n, hidden]."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)


def prompt_rows(embeddings: torch.Tensor, table: PromptTable, pieces: Sequence[Piece]) -> None:
    """Writes soft-prompt rows into `embeddings` [rows, hidden] in place, rounded to its dtype."""
    for slot, row, offset, count in pieces:
        entry = table.get(slot)
        assert entry is not None and entry.tensors[0] is not None, f"slot {slot} has no soft prompt"
        embeddings[row : row + count] = entry.tensors[0][offset : offset + count].to(embeddings.dtype)


class EmbeddingTable(SlotTable):
    """One column: a whole embedding [vocabulary, width] of the slot's own."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)


class LookupTable(SlotTable):
    """Columns A [r, vocabulary], B [width, r], inner [r] or [r, r] and outer [width]; scalar scale. See `lowrank`."""

    strided = frozenset((0, 1))

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(4, capacity, device)


def look_up(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: EmbeddingTable, factor: float = 1.0) -> None:
    """y[row] = factor · E[ids[row]] where the slot has an embedding, in place. y [rows, width]; ids int64 [rows]."""
    if not table.touches(rowmap):
        return
    for run, entry in table.entries(rowmap):
        assert entry.tensors[0] is not None
        found = entry.tensors[0][ids[run.start : run.stop]]
        y[run.start : run.stop] = (found.float() * factor).to(y.dtype)


def add_low_rank(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: LookupTable, factor: float = 1.0) -> None:
    """y[row] += factor · scale · outer ⊙ (A[:, ids[row]]ᵀ D Bᵀ), in place; D as in `lowrank`.

    y [rows, width], any float dtype, summed in fp32.
    """
    if not table.touches(rowmap):
        return
    for run, entry in table.entries(rowmap):
        a = entry.tensors[0]
        assert a is not None
        added = expanded(a[:, ids[run.start : run.stop]].float().T, entry)
        part = y[run.start : run.stop]
        part.copy_((part.float() + factor * added).to(y.dtype))
