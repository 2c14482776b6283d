"""The tensors of a checkpoint: each is taken once, by name and shape, and none may be left over."""

from collections.abc import Callable

import torch

from deltaserve.errors import BadCheckpoint
from deltaserve.formats.folder import Tensors
from deltaserve.formats.options import shown

SHOWN = 5
"""Names in one message."""
LONGEST = 500
"""Characters of the names in one message."""

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}


class Ledger:
    """`renamed` gives a tensor of the file the name by which it is asked for."""

    def __init__(self, tensors: Tensors, renamed: Callable[[str], str]) -> None:
        self.warnings: list[str] = []
        """What the operator should know; see `warn`."""
        self.taken = 0
        self._tensors = tensors
        self._left: dict[str, str] = {}
        for name in tensors.names():
            asked = renamed(name)
            if asked in self._left:
                raise BadCheckpoint(
                    f"tensors {shown(self._left[asked])} and {shown(name)} are for one and the same place"
                )
            self._left[asked] = name

    def has(self, name: str) -> bool:
        """Whether a tensor is there that nobody has taken."""
        return name in self._left

    def names(self) -> tuple[str, ...]:
        """All that are left."""
        return tuple(self._left)

    def below(self, module: str) -> tuple[str, ...]:
        """Tensors left at a module or below."""
        return tuple(name for name in self._left if name.startswith(module + "."))

    def warn(self, text: str) -> None:
        """Adds a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor [shape], contiguous, in its file's dtype (float64 as float32). Raises BadCheckpoint."""
        tensor = self._take(name, shape)
        if tensor.dtype is torch.float64:
            tensor = tensor.float()
        if tensor.dtype not in _FLOATS:
            raise BadCheckpoint(f"tensor {name!r} is of type {tensor.dtype}; a float type is expected")
        if not bool(torch.isfinite(tensor).all()):
            raise BadCheckpoint(f"tensor {name!r} holds NaN or infinite numbers", metadata={"tensor": name})
        return tensor.contiguous()

    def integers(self, name: str, shape: tuple[int, ...], below: int) -> torch.Tensor:
        """Whole numbers from 0, int64 [shape]. Raises BadCheckpoint."""
        tensor = self._take(name, shape)
        if tensor.dtype.is_floating_point or tensor.dtype is torch.bool:
            raise BadCheckpoint(f"tensor {name!r} is of type {tensor.dtype}; whole numbers are expected")
        tensor = tensor.long().contiguous()
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= below):
            raise BadCheckpoint(f"tensor {name!r} holds numbers that are not from 0 to {below - 1}")
        return tensor

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._left:
            raise BadCheckpoint(f"tensor {name!r} is missing; its module is targeted", metadata={"tensor": name})
        found = self.shape(name)
        if found != shape:
            raise BadCheckpoint(
                f"tensor {name!r} has shape {shown(list(found))}; this backbone and the config make it {list(shape)}",
                metadata={"tensor": name, "shape": shown(list(found)), "expected": str(list(shape))},
            )
        self.taken += 1
        return self._tensors.get(self._left.pop(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is left, without reading it."""
        return self._tensors.shape(self._left[name])

    def drop(self, name: str) -> None:
        """Takes a tensor that is a copy of what the backbone or another tensor holds."""
        del self._left[name]
        self.taken += 1

    def finish(self) -> None:
        """Raises BadCheckpoint if a tensor found no place."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise BadCheckpoint(
                f"no place in this backbone or in the config for {', '.join(names[:SHOWN])[:LONGEST]}{more}",
                reason="TENSORS_LEFT_OVER",
                metadata={"tensors": ",".join(names[:SHOWN])[:LONGEST], "count": str(len(names))},
            )
