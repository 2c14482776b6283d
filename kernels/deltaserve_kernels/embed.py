"""Rows that enter the first layer: token embeddings, and soft-prompt rows in their places."""

from collections.abc import Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.lowrank import expanded
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.rows import RowsTable, replace_rows
from deltaserve_kernels.slots import SlotTable

Piece = tuple[int, int, int, int]
"""(slot, row, offset, count): rows [row, row + count) are rows [offset, offset + count) of the slot's prompt."""


class PromptTable(SlotTable):
    """One column: the soft prompt's rows [n, hidden]."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)


def prompt_rows(embeddings: torch.Tensor, table: PromptTable, pieces: Sequence[Piece]) -> None:
    """Writes soft-prompt rows into `embeddings` [rows, hidden] in place, rounded to its dtype."""
    path(_PROMPTS, embeddings.device)(embeddings, table, pieces)


def reference_prompts(embeddings: torch.Tensor, table: PromptTable, pieces: Sequence[Piece]) -> None:
    for slot, row, offset, count in pieces:
        entry = table.get(slot)
        assert entry is not None and entry.tensors[0] is not None, f"slot {slot} has no soft prompt"
        embeddings[row : row + count] = entry.tensors[0][offset : offset + count].to(embeddings.dtype)


class EmbeddingTable(SlotTable):
    """One column: a whole embedding [vocabulary, width] of the slot's own."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)


def rows_of(
    ids: torch.Tensor, rowmap: RowMap, weight: torch.Tensor, whole: EmbeddingTable, own: RowsTable
) -> torch.Tensor:
    """E[ids] with E′ for E where a slot brings its own, then a slot's rows for their ids; [rows, width], in one gather.

    weight [vocabulary, width]; ids int64 [rows].
    """
    return path(_GATHERS, weight.device)(ids, rowmap, weight, whole, own)


def reference_rows_of(
    ids: torch.Tensor, rowmap: RowMap, weight: torch.Tensor, whole: EmbeddingTable, own: RowsTable
) -> torch.Tensor:
    y = weight[ids]
    look_up(y, ids, rowmap, whole)
    replace_rows(y, ids, rowmap, own)
    return y


class LookupTable(SlotTable):
    """Columns A [r, vocabulary], B [width, r], inner [r] or [r, r] and outer [width]; scalar scale. See `lowrank`."""

    strided = frozenset((0, 1))

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(4, capacity, device)


def look_up(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: EmbeddingTable, factor: float = 1.0) -> None:
    """y[row] = factor · E[ids[row]] where the slot has an embedding, in place. y [rows, width]; ids int64 [rows]."""
    if table.touches(rowmap):
        path(_LOOKS, y.device)(y, ids, rowmap, table, factor)


def reference_look_up(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: EmbeddingTable, factor: float) -> None:
    for run, entry in table.entries(rowmap):
        assert entry.tensors[0] is not None
        found = entry.tensors[0][ids[run.start : run.stop]]
        y[run.start : run.stop] = (found.float() * factor).to(y.dtype)


def add_low_rank(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: LookupTable, factor: float = 1.0) -> None:
    """y[row] += factor · scale · outer ⊙ (A[:, ids[row]]ᵀ D Bᵀ), in place; D as in `lowrank`.

    y [rows, width], any float dtype, summed in fp32.
    """
    if table.touches(rowmap):
        path(_LOW_RANKS, y.device)(y, ids, rowmap, table, factor)


def reference_low_rank(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: LookupTable, factor: float) -> None:
    for run, entry in table.entries(rowmap):
        a = entry.tensors[0]
        assert a is not None
        added = expanded(a[:, ids[run.start : run.stop]].float().T, entry)
        part = y[run.start : run.stop]
        part.copy_((part.float() + factor * added).to(y.dtype))


def triton_prompts(embeddings: torch.Tensor, table: PromptTable, pieces: Sequence[Piece]) -> None:
    from deltaserve_kernels.gpu import embed

    embed.prompt_rows(embeddings, table, pieces)


def triton_look_up(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: EmbeddingTable, factor: float) -> None:
    from deltaserve_kernels.gpu import embed

    embed.look_up(y, ids, rowmap, table, factor)


def triton_low_rank(y: torch.Tensor, ids: torch.Tensor, rowmap: RowMap, table: LookupTable, factor: float) -> None:
    from deltaserve_kernels.gpu import embed

    embed.add_low_rank(y, ids, rowmap, table, factor)


def triton_rows_of(
    ids: torch.Tensor, rowmap: RowMap, weight: torch.Tensor, whole: EmbeddingTable, own: RowsTable
) -> torch.Tensor:
    from deltaserve_kernels.gpu import embed

    return embed.rows_of(ids, rowmap, weight, whole, own)


_GATHERS = {Implementation.REFERENCE: reference_rows_of, Implementation.TRITON: triton_rows_of}
_PROMPTS = {Implementation.REFERENCE: reference_prompts, Implementation.TRITON: triton_prompts}
_LOOKS = {Implementation.REFERENCE: reference_look_up, Implementation.TRITON: triton_look_up}
_LOW_RANKS = {Implementation.REFERENCE: reference_low_rank, Implementation.TRITON: triton_low_rank}
