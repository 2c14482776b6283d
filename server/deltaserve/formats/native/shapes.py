"""Shapes, dtypes and numbers of a file's tensors: each is what the backbone makes it, or refused by name."""

import torch

from deltaserve.deltas.sites import BackboneSpec
from deltaserve.errors import BadCheckpoint

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32,)
MOST_ROWS = 1 << 14
"""Of a prefix or a prompt."""


def tensor(
    found: torch.Tensor,
    shape: tuple[int | None, ...],
    place: str,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    empty: bool = False,
) -> None:
    """None in a shape is any size, at least 1 unless it may be `empty`. Raises BadCheckpoint."""
    sizes = tuple(found.shape)
    least = 0 if empty else 1
    fits = len(sizes) == len(shape) and all(
        size >= least if wanted is None else size == wanted for size, wanted in zip(sizes, shape, strict=True)
    )
    if not fits:
        expected = ["any" if wanted is None else wanted for wanted in shape]
        raise BadCheckpoint(
            f"{place} has shape {list(sizes)}; this backbone makes it {expected}".replace("'any'", "n"),
            metadata={"shape": str(list(sizes))},
        )
    if found.dtype not in dtypes:
        able = ", ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise BadCheckpoint(f"{place} is of type {found.dtype}; expected is one of {able}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise BadCheckpoint(f"{place} holds NaN or infinite numbers")


def below(index: torch.Tensor, limit: int, place: str) -> None:
    """All of them from 0 and below `limit`. Raises BadCheckpoint."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
        raise BadCheckpoint(f"{place} holds numbers that are not from 0 to {limit - 1}")


def length(rows: int, spec: BackboneSpec, place: str) -> None:
    """So many rows before a text leave room for one. Raises BadCheckpoint."""
    if rows > MOST_ROWS or (spec.max_positions is not None and rows >= spec.max_positions):
        raise BadCheckpoint(f"{place} has {rows} rows, which leave no room for a text here")
