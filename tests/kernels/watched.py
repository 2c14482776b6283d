"""Memory that is looked at: every access of Triton's interpreter is looked up, and NaN lies around every buffer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="there is no Triton here")

PAD = 5


@dataclass
class Watch:
    """Ranges of addresses that a launch may read, and of those that it may write; `outside` says what was not so."""

    known: list[torch.Tensor] = field(default_factory=list)
    """What deltas bring: kernels come to it by addresses in boards."""
    given: list[torch.Tensor] = field(default_factory=list)
    """Inputs, which may not be written."""
    outside: list[str] = field(default_factory=list)
    launches: int = 0
    accesses: int = 0
    read: set[int] = field(default_factory=set)
    """Bytes of floats, and of what deltas bring, that were read; and that were written."""
    written: set[int] = field(default_factory=set)
    held: list[torch.Tensor] = field(default_factory=list)
    """So that no memory is given twice."""
    _readable: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    _writable: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    _counted: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))

    def launch(self, arguments: list[torch.Tensor]) -> None:
        inputs = {t.data_ptr() for t in self.given}
        self._readable = ranges([*arguments, *self.known])
        self._writable = ranges([t for t in arguments if t.is_floating_point() and t.data_ptr() not in inputs])
        self._counted = ranges([t for t in arguments if t.is_floating_point()] + self.known)
        self.held += arguments
        self.launches += 1

    def look(self, addresses: np.ndarray, mask: np.ndarray, size: int, *, write: bool) -> None:
        shape = np.broadcast_shapes(addresses.shape, mask.shape)
        live = np.broadcast_to(addresses, shape)[np.broadcast_to(mask, shape).astype(bool)].astype(np.uint64)
        self.accesses += live.size
        allowed = self._writable if write else self._readable
        wrong = ~(within(live, allowed) & within(live + np.uint64(size - 1), allowed))
        inside = np.unique(live[within(live, self._counted)])
        counted = self.written if write else self.read
        for byte in range(size):
            counted.update((inside + np.uint64(byte)).tolist())
        if wrong.any():
            self.outside.append(f"{'write' if write else 'read'} of {int(wrong.sum())} of {live.size} places")


def within(addresses: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which of them lie in one of the ranges, which are sorted and apart."""
    if not len(allowed):
        return np.zeros(addresses.shape, dtype=bool)
    place = np.searchsorted(allowed[:, 0], addresses, side="right").astype(np.int64) - 1
    return (place >= 0) & (addresses < allowed[np.maximum(place, 0), 1])


def ranges(tensors: list[torch.Tensor]) -> np.ndarray:
    """[n, 2]: where each row of each tensor begins and ends, in bytes, sorted and joined."""
    found: list[tuple[int, int]] = []
    for t in tensors:
        if not t.numel():
            continue
        whole = t if t.ndim else t.reshape(1)
        lines = torch.zeros((), dtype=torch.int64)
        for length, stride in zip(whole.shape[:-1], whole.stride()[:-1], strict=True):
            lines = lines.unsqueeze(-1) + torch.arange(length) * stride
        size, last = t.element_size(), whole.shape[-1]
        assert whole.stride(-1) == 1 or last == 1
        begins = (t.data_ptr() + lines.flatten() * size).tolist()
        found += [(begin, begin + last * size) for begin in begins]
    joined: list[list[int]] = []
    for begin, end in sorted(found):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return np.array(joined, dtype=np.uint64).reshape(-1, 2)


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """The interpreter's own reads and writes, looked up; what launchers allocate is NaN."""
    seen, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def watched_load(self, ptrs, mask, *rest):
        seen.look(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8, write=False)
        # A read that was found out is not done: it might end the process.
        return load(self, ptrs, zeroed(mask) if seen.outside else mask, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        seen.look(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8, write=True)
        return store(self, ptrs, value, zeroed(mask) if seen.outside else mask, *rest)

    def zeroed(mask):
        return interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype)

    def watched_call(self, *args, **kwargs):
        seen.launch([a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)])
        return call(self, *args, **kwargs)

    def masked_load(self, ptrs, mask, other, *rest):
        return watched_load(self, ptrs, mask, other, *rest)

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(executor, "__call__", watched_call)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        yield seen
    finally:
        torch.use_deterministic_algorithms(False)


class Pages:
    """Buffers with NaN around them, of which nothing may have changed in the end."""

    def __init__(self) -> None:
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[n, width] with room between its rows, or [n, heads, width] with room between heads too."""
        around = torch.full([length + PAD for length in values.shape], float("nan"), dtype=values.dtype)
        inside = around[tuple(slice(2, 2 + length) for length in values.shape)]
        inside.copy_(values)
        self._held.append((around, inside))
        return inside

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Contiguous."""
        if not values.is_floating_point():
            return values.clone()
        around = torch.full((values.numel() + 64,), float("nan"), dtype=values.dtype)
        inside = around[32 : 32 + values.numel()].view(values.shape)
        inside.copy_(values)
        self._held.append((around, inside))
        return inside

    def unharmed(self) -> bool:
        for around, inside in self._held:
            inside.fill_(float("nan"))
            if not bool(around.isnan().all()):
                return False
        return True
