"""Rows that enter the first layer: token embeddings, and soft-prompt rows in their places."""

from collections.abc import Sequence

import torch

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
