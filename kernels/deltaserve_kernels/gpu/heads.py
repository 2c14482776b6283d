"""Heads as grouped products: a launch for each layer and dtype, whatever slots there are and however wide theirs."""

from collections.abc import Mapping, Sequence

import torch
import triton

from deltaserve_kernels.activations import activated
from deltaserve_kernels.dense import Layer
from deltaserve_kernels.gpu import demands, dense
from deltaserve_kernels.gpu.board import KINDS
from deltaserve_kernels.gpu.launch import TYPES, on_tensor_cores, precision
from deltaserve_kernels.gpu.tiling import tiles
from deltaserve_kernels.gpu.tuning import DENSE
from deltaserve_kernels.rowmap import RowMap


def heads(x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Sequence[Layer]]) -> list[torch.Tensor]:
    """Each row through its slot's layers: h = act(h Wᵀ + b). x [rows, hidden] of a float dtype, no row bare.

    Returns a row's outputs as fp32 [width of its head], in row order. Raises ValueError, before anything is launched,
    where rows or a layer cannot be read so.
    """
    _check(x, rowmap, layers)
    widths = {slot: [x.shape[1], *(weight.shape[0] for weight, _, _ in own)] for slot, own in layers.items()}
    hidden = x
    for depth in range(max(len(own) for own in layers.values())):
        deep = [slot for slot in rowmap.active if depth < len(layers[slot])]
        outputs = max([*(widths[slot][depth + 1] for slot in deep), 1])
        # Slots that are through keep what they have.
        kept = max([*(widths[slot][-1] for slot in rowmap.active if depth >= len(layers[slot])), outputs])
        made = torch.empty(rowmap.rows, kept, dtype=torch.float32, device=x.device)
        if len(deep) < len(rowmap.active):
            made[:, : min(kept, hidden.shape[1])] = hidden[:, :kept]
        _product(made, hidden, rowmap, {slot: layers[slot][depth] for slot in deep})
        _activate(made, rowmap, {slot: (layers[slot][depth][2], widths[slot][depth + 1]) for slot in deep})
        hidden = made
    last = {slot: own[-1] for slot, own in widths.items()}
    return [hidden[row, : last[run.slot]] for run in rowmap.runs for row in range(run.start, run.stop)]


def _check(x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Sequence[Layer]]) -> None:
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[0] != rowmap.rows or x.dtype not in TYPES:
        raise ValueError(f"x: shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype}; the map has {rowmap.rows} rows")
    for slot in rowmap.active:
        width = x.shape[1]
        for number, (weight, bias, _) in enumerate(layers[slot]):
            demands.tensor(f"layer {number}'s weight", slot, weight, (None, width))
            width = weight.shape[0]
            if bias is not None:
                demands.tensor(f"layer {number}'s bias", slot, bias, (width,))


def _product(out: torch.Tensor, x: torch.Tensor, rowmap: RowMap, layers: Mapping[int, Layer]) -> None:
    """out[:, : its width] = x Wᵀ + b for the rows of these slots; launches for those that read as many inputs."""
    for inputs in dict.fromkeys(weight.shape[1] for weight, _, _ in layers.values()):
        alike = {slot: layer for slot, layer in layers.items() if layer[0].shape[1] == inputs}
        board = torch.zeros(max(rowmap.active) + 1, dense.COLUMNS, dtype=torch.int64)
        for slot, (weight, bias, _) in alike.items():
            after = (0, 0) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
            told = (KINDS[weight.dtype], weight.data_ptr(), weight.shape[0], *after, 1, 0)
            board[slot] = torch.tensor(told, dtype=torch.int64)
        plan, told_all = DENSE.choose(rowmap), board.to(x.device)
        cut = tiles(rowmap, plan.m)
        most = max(weight.shape[0] for weight, _, _ in alike.values())
        for dtype in dict.fromkeys(weight.dtype for weight, _, _ in alike.values()):
            dense.dense[(len(cut), triton.cdiv(most, plan.n))](
                out, x, rowmap.order, cut, told_all, out.stride(0), x.stride(0), inputs,
                KIND=KINDS[dtype], TYPE=TYPES[dtype], COLUMNS=dense.COLUMNS, M=plan.m, N=plan.n, K=plan.k,
                HALF=on_tensor_cores(x.dtype, dtype), PRECISION=precision(dtype), num_warps=plan.warps,
            )  # fmt: skip


def _activate(out: torch.Tensor, rowmap: RowMap, told: Mapping[int, tuple[str | None, int]]) -> None:
    """In one piece where all rows have one activation and width, as in most batches."""
    if len(told) == len(rowmap.active) and len(set(told.values())) == 1:
        ((name, width),) = set(told.values())
        out[:, :width] = activated(out[:, :width], name)
        return
    for run in rowmap.runs:
        name, width = told.get(run.slot, (None, 0))
        if name is not None:
            part = out[run.start : run.stop, :width]
            part.copy_(activated(part, name))
