"""Stager: all that a forward's kernels read of its plan, to the device in one copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from deltaserve.deltas.sites import Axis
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.staging import Staging


@dataclass(frozen=True, eq=False)
class Staged:
    """`numbers` int64 by name, as they were given; maps and sequences with what kernels will ask of them."""

    numbers: Mapping[str, torch.Tensor]
    maps: Mapping[Axis, RowMap]
    attention: Mapping[Axis, Sequences]


class Stager:
    """Remembers what kernels asked of maps and sequences of earlier forwards, and makes that of the next one's ahead.

    What they ask for the first time they make themselves, and it goes to the device on its own. `copies` counts those
    that were made here.
    """

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device)
        self._last: Staged | None = None
        self._asked: dict[Axis, set[int]] = {}
        self._cuts: dict[Axis, set[object]] = {}

    @property
    def copies(self) -> int:
        return self._staging.copies

    def shipped(
        self,
        numbers: Mapping[str, torch.Tensor],
        maps: Mapping[Axis, RowMap],
        attention: Mapping[Axis, tuple[Sequences, Sequence[int]]],
    ) -> Staged:
        """Each of `attention` with the cache rows that its keys and values go to, [] for none."""
        self._learn()
        found: dict[str, torch.Tensor] = {}
        writes: dict[Axis, torch.Tensor] = {}
        for name, given in numbers.items():
            self._staging.put(given, torch.int64, lambda tensor, name=name: found.update({name: tensor}))  # type: ignore[misc]
        for axis, rowmap in maps.items():
            rowmap.stage(self._staging, self._asked.get(axis, ()))
        for axis, (sequences, write) in attention.items():
            if write:
                self._staging.put(write, torch.int64, lambda tensor, axis=axis: writes.update({axis: tensor}))  # type: ignore[misc]
            if self._cuts.get(axis):
                # Asked for by Triton's launchers alone, so there is Triton.
                from deltaserve_kernels.gpu import cut

                for key in self._cuts[axis]:
                    cut.stage(sequences, key, self._staging)
        self._staging.ship()
        whole = {axis: replace(sequences, write=writes.get(axis)) for axis, (sequences, _) in attention.items()}
        self._last = Staged(found, maps, whole)
        return self._last

    def _learn(self) -> None:
        if self._last is None:
            return
        for axis, rowmap in self._last.maps.items():
            self._asked.setdefault(axis, set()).update(rowmap.asked)
        for axis, sequences in self._last.attention.items():
            self._cuts.setdefault(axis, set()).update(sequences.kept)
