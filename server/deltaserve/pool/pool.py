"""The deltas that are resident on the device: one arena reserved at start, under a byte budget.

Owned by the engine's thread. The loader's one thread may call `copy` for a range that it was given; everything else is
the engine's.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from deltaserve.deltas.delta import Delta, mapped
from deltaserve.pool.bases import Bases, Stored
from deltaserve.pool.extents import Extents

_ALIGN = 256


@dataclass(eq=False)
class Resident:
    """A delta in the arena. `slot` is what kernels know it by; `pins` counts the running requests that use it.

    `nbytes` are its own; `bases` it shares with others.

    `promised`: it was loaded for a request that has not pinned it yet; two that wait would else evict each other's for
    ever.
    """

    key: int
    label: str
    slot: int
    start: int
    nbytes: int
    kinds: tuple[str, ...]
    bases: tuple[Stored, ...] = ()
    delta: Delta | None = None
    pins: int = 0
    promised: bool = False


class Pool:
    """Slots and arena. `capacity` in bytes; `slots` deltas at most."""

    def __init__(self, capacity: int, slots: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._arena = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._extents = Extents(capacity, _ALIGN)
        self._bases = Bases(self._arena, self._extents)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._resident: OrderedDict[int, Resident] = OrderedDict()
        self._dtype = dtype

    @property
    def capacity(self) -> int:
        return self._extents.capacity

    @property
    def used(self) -> int:
        return self._extents.used

    @property
    def resident(self) -> tuple[int, ...]:
        """Keys, least recently used first."""
        return tuple(self._resident)

    @property
    def pins(self) -> int:
        return sum(r.pins for r in list(self._resident.values()))

    def get(self, key: int) -> Resident | None:
        return self._resident.get(key)

    def size(self, delta: Delta) -> int:
        """Bytes of the arena that a delta takes for itself, alignment included."""
        return sum(self._extents.rounded(self._nbytes(t)) for t in delta.tensors())

    def shared(self, delta: Delta) -> int:
        """Bytes of the arena that a delta's bases take, once for all that have them."""
        return sum(self._extents.rounded(self._nbytes(t)) for t in delta.bases.values())

    def reserve(self, key: int, label: str, delta: Delta) -> Resident | None:
        """A slot and a range for a delta, and for those of its bases that are not here; None where there is no room.

        Raises nothing; `copy` fills it.
        """
        if not self._free_slots:
            return None
        bases = self._bases.take((name, t.shape, self._stored(t)) for name, t in delta.bases.items())
        if bases is None:
            return None
        nbytes = self.size(delta)
        start = self._extents.take(nbytes)
        if start is None:
            self._bases.give(bases)
            return None
        return Resident(key, label, self._free_slots.pop(), start, self._extents.rounded(nbytes), delta.kinds, bases)

    def copy(self, place: Resident, delta: Delta) -> Delta:
        """Copies a delta's bytes into its range; returns the delta whose tensors are views of the arena.

        A base is filled by the first that comes to it: who was to do that may have failed.
        """
        at = place.start
        for base in place.bases:
            if not base.filled:
                base.tensor.copy_(delta.bases[base.key])
                base.filled = True

        def move(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal at
            dtype = self._stored(tensor)
            size = self._nbytes(tensor)
            view = self._arena[at : at + size].view(dtype).view(tensor.shape)
            view.copy_(tensor)
            at += self._extents.rounded(size)
            return view

        return mapped(delta, move, {base.key: base.tensor for base in place.bases})

    def publish(self, place: Resident, delta: Delta) -> None:
        """Makes a copied delta findable."""
        assert place.key not in self._resident
        place.delta = delta
        self._resident[place.key] = place

    def touch(self, key: int) -> None:
        self._resident.move_to_end(key)

    def victim(self, incoming: Delta, promised: bool = False) -> Resident | None:
        """The least recently used delta that nobody uses, or None; those that are promised only if told so.

        The last user of a base that the incoming delta has comes last: its bytes would be taken again at once.
        """
        unused = [r for r in self._resident.values() if r.pins == 0 and (promised or not r.promised)]
        spare = (r for r in unused if not any(b.users == 1 and b.key in incoming.bases for b in r.bases))
        return next(spare, unused[0] if unused else None)

    def release(self, place: Resident) -> int:
        """Frees a slot, its range and the bases that only it used; returns the bytes.

        The caller has taken it out of the backbone's tables.
        """
        assert place.pins == 0
        if self._resident.get(place.key) is place:
            del self._resident[place.key]
        place.delta = None
        self._free_slots.append(place.slot)
        bases, place.bases = place.bases, ()
        return self._extents.give(place.start) + self._bases.give(bases)

    def check(self) -> None:
        self._extents.check()
        self._bases.check()

    def _nbytes(self, tensor: torch.Tensor) -> int:
        return tensor.numel() * self._stored(tensor).itemsize

    def _stored(self, tensor: torch.Tensor) -> torch.dtype:
        """Whole numbers are places, and stay as they are."""
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
