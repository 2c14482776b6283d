"""What launchers demand of what they are given. A ValueError names the argument; nothing has been launched then."""

from collections.abc import Iterable

import torch

from deltaserve_kernels.gpu.launch import TYPES
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable


def rows(rowmap: RowMap, table: SlotTable, **given: torch.Tensor) -> None:
    """Each is [rows of the map, width] of a float dtype, on the table's device, with contiguous rows; slots exist."""
    if rowmap.active and not 0 <= rowmap.active[0] <= rowmap.active[-1] < table.capacity:
        slot = rowmap.active[0] if rowmap.active[0] < 0 else rowmap.active[-1]
        raise ValueError(f"rowmap: slot {slot}; this table has slots 0 to {table.capacity - 1}")
    for name, tensor in given.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}; rows are of {_dtypes()}")
        if tensor.ndim != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}; read are [rows, width], each row "
                "contiguous"
            )
        if tensor.shape[0] != rowmap.rows:
            raise ValueError(f"{name}: {tensor.shape[0]} rows; the map has {rowmap.rows}")
        if tensor.device != table.device:
            raise ValueError(f"{name}: on {tensor.device}; what slots have is on {table.device}")


def tensor(
    name: str,
    slot: int,
    given: torch.Tensor | None,
    shape: tuple[int | None, ...],
    *,
    dtypes: Iterable[torch.dtype] = TYPES,
    strided: bool = False,
) -> torch.Tensor:
    """What a slot has: of this shape (None: any length), of one of these dtypes, contiguous; `strided`: its rows."""
    if given is None:
        raise ValueError(f"{name}: slot {slot} has none")
    alike = given.ndim == len(shape) and all(n in (m, None) for m, n in zip(given.shape, shape, strict=True))
    if not alike:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: of slot {slot}, shape {tuple(given.shape)}; [{wanted}] goes with these rows")
    if given.dtype not in dtypes:
        raise ValueError(f"{name}: of slot {slot}, dtype {given.dtype}; read are {_dtypes(dtypes)}")
    if not (given.is_contiguous() or (strided and given.stride(-1) == 1)):
        raise ValueError(f"{name}: of slot {slot}, strides {given.stride()}; its rows have to be contiguous")
    return given


def _dtypes(dtypes: Iterable[torch.dtype] = TYPES) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
