"""Staging: whole numbers of one forward, put down one after the other and taken to the device in one copy."""

from collections.abc import Callable, Sequence

import torch

Taker = Callable[[torch.Tensor], None]
"""Gets what was put down, on the device."""

_ALIGN = 16
_HELD = 2


class Staging:
    """`put` as often as there is something, then `ship`: one host-to-device copy, however many pieces there are.

    On a GPU the numbers stand in pinned memory, and the copy runs on the current stream beside the host's next work;
    the memory is written again when the copy that read it is done, so that `ship` waits for no kernel. What was
    shipped stays as it is for as long as somebody holds it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = 0
        self._pieces: list[tuple[torch.Tensor, Taker]] = []
        self._pinned: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def put(self, numbers: Sequence[int] | torch.Tensor, dtype: torch.dtype, take: Taker) -> None:
        """`take` is called by `ship`, with the same numbers on the device, in `dtype` and shape."""
        self._pieces.append((torch.as_tensor(numbers, dtype=dtype), take))

    def ship(self) -> None:
        """Hands everything out; what is put down from now on is the next forward's."""
        pieces, self._pieces = self._pieces, []
        if self.device.type == "cpu":
            for piece, take in pieces:
                take(piece)
            return
        ends = [0]
        for piece, _ in pieces:
            ends.append(ends[-1] + -(-piece.numel() * piece.element_size() // _ALIGN) * _ALIGN)
        there = self._copied(pieces, ends)
        for (piece, take), begin in zip(pieces, ends, strict=False):
            size = piece.numel() * piece.element_size()
            take(there[begin : begin + size].view(piece.dtype).view(piece.shape))

    def _copied(self, pieces: Sequence[tuple[torch.Tensor, Taker]], ends: Sequence[int]) -> torch.Tensor:
        """uint8 [bytes] on the device."""
        host = self._room(ends[-1])
        for (piece, _), begin in zip(pieces, ends, strict=False):
            size = piece.numel() * piece.element_size()
            host[begin : begin + size].copy_(piece.contiguous().view(-1).view(torch.uint8))
        there = host[: ends[-1]].to(self.device, non_blocking=True)
        self.copies += 1
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._pinned.append((host, event))
        return there

    def _room(self, size: int) -> torch.Tensor:
        """uint8 [at least `size`], which no copy reads any more."""
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8)
        if len(self._pinned) >= _HELD:
            host, event = self._pinned.pop(0)
            event.synchronize()
            if host.shape[0] >= size:
                return host
        return torch.empty(max(size, 1 << 16), dtype=torch.uint8, pin_memory=True)
