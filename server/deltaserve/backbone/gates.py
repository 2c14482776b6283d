"""Gates: one number a sequence, read from all of its rows."""

import torch

from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable


class GateTable(SlotTable):
    """Columns weight [n, d] and bias [n] or None."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)


def means(u: torch.Tensor, rowmap: RowMap, table: GateTable, sequences: Sequences) -> torch.Tensor:
    """mean over a sequence's rows of σ(u weightᵀ + bias): its first number and its last, fp32 [sequences, 2].

    u [rows, d], any float dtype; ones where a slot has no gate. The sequences are there as a whole.
    """
    assert not sequences.causal, "no cache of keys and values reproduces a gate"
    gates = torch.ones(u.shape[0], 2, device=u.device)
    for run, entry in table.entries(rowmap):
        weight, bias = entry.tensors
        assert weight is not None
        ends = [0, weight.shape[0] - 1]
        found = torch.nn.functional.linear(
            u[run.start : run.stop].float(), weight[ends].float(), None if bias is None else bias[ends].float()
        )
        gates[run.start : run.stop] = torch.sigmoid(found)
    numbers, counts = _numbers(sequences, u)
    return gates.new_zeros(len(sequences.items), 2).index_add_(0, numbers, gates) / counts


def by_row(means: torch.Tensor, sequences: Sequences, rows: torch.Tensor) -> torch.Tensor:
    """The first number of each row's sequence, fp32 [rows]."""
    return means[:, 0].index_select(0, _numbers(sequences, rows)[0])


def _numbers(sequences: Sequences, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each row's sequence, int64 [rows], and how many rows each has, fp32 [sequences, 1]."""
    found = sequences.kept.get("numbers")
    if found is None:
        counts = torch.tensor([sequence.queries for sequence in sequences.items])
        numbers = torch.repeat_interleave(torch.arange(len(sequences.items)), counts)
        assert numbers.shape[0] == rows.shape[0], "a row of no sequence"
        found = sequences.kept["numbers"] = (numbers.to(rows.device), counts.float().unsqueeze(1).to(rows.device))
    assert isinstance(found, tuple)
    return found
