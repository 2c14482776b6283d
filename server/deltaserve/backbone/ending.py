"""Where a sublayer ends: what the adapters at its last linear can read, and where their result goes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from deltaserve.backbone.reach import reached
from deltaserve.deltas.adapters import Positions, Tap
from deltaserve.deltas.sites import Axis, Site, Sublayer
from deltaserve.plan import Now
from deltaserve_kernels.rowmap import Grid, RowMap

_OF_THE_STREAM = frozenset({Tap.RESIDUAL, Tap.SUM, Tap.NORMED})


class Module(Protocol):
    """A wrapped module, as an ending needs it; see `wrap.WrappedModule`."""

    site: Site

    def keep(self, slot: int) -> None: ...

    def forget(self, slot: int) -> None: ...


class Norm(Module, Protocol):
    """See `norm.WrappedNorm`."""

    def expect(self, slot: int) -> None: ...

    def normed(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor: ...

    def edits(self, rowmap: RowMap) -> bool: ...


@dataclass(frozen=True, eq=False)
class Ending:
    """The modules around the end of a sublayer. `norms` finds a norm of the backbone by its name.

    What the norm in front got, or the first linear where the norm stands behind, is the residual stream: modules keep a
    reference to it for the slots that read it, and for these alone.
    """

    sublayer: Sublayer
    first: Module
    norm: Norm
    sandwich: Norm | None
    norms: Callable[[str], Norm]

    @property
    def behind(self) -> Norm | None:
        """The norm that stands between the last linear and the stream behind the sublayer."""
        return self.norm if self.sublayer.post else self.sandwich

    @property
    def start(self) -> Module:
        """What gets the residual stream."""
        return self.first if self.sublayer.post else self.norm

    def prepare(self, slot: int, taps: Collection[Tap], replaces: bool) -> None:
        """From now on what `taps` names is kept for a slot, and if it `replaces`, its rows stand for a norm's."""
        if replaces and self.behind is not None:
            self.behind.expect(slot)
        if (replaces and not self.sublayer.post) or not _OF_THE_STREAM.isdisjoint(taps):
            self.start.keep(slot)
        if Tap.INPUT in taps:
            self.first.keep(slot)

    def read_later(self, rowmap: RowMap) -> bool:
        """Whether adapters behind the sandwich norm read what is kept once more."""
        return self.sandwich is not None and self.sandwich.edits(rowmap)

    def forget(self, slot: int) -> None:
        self.first.forget(slot)
        self.norm.forget(slot)
        if self.sandwich is not None:
            self.sandwich.forget(slot)


@dataclass(eq=False)
class View:
    """One site in one forward, as its adapters see it. `x` [rows, in] is what it got; `total` fp32 [rows, out] what it
    gives, so far. `ending` is None where no sublayer ends here.
    """

    now: Now
    axis: Axis
    x: torch.Tensor
    total: torch.Tensor
    dtype: torch.dtype
    ending: Ending | None
    _made: dict[tuple[Tap, str | None], torch.Tensor] = field(default_factory=dict)

    @property
    def rowmap(self) -> RowMap:
        return self.now.rowmap(self.axis)

    def reached(self, positions: Positions | None) -> RowMap:
        return self.rowmap if positions is None else reached(self.now, self.axis, positions)

    def read(self, tap: Tap, norm: str | None) -> torch.Tensor:
        """What a tap names, [rows, width], in any float dtype; not to be written to."""
        match tap:
            case Tap.OUTPUT:
                return self.total
            case Tap.OWN:
                return self.x
            case Tap.INPUT:
                return self.now.kept[self._end.first.site.name]
            case Tap.RESIDUAL:
                return self.now.kept[self._end.start.site.name]
        key = (tap, norm if tap is Tap.NORMED else None)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._sum() if tap is Tap.SUM else self._normed(norm)
        return found

    def put(self, grid: Grid, rows: torch.Tensor, replaces: bool) -> None:
        """What some rows give from here on, fp32 [n, out] as they stand in `grid`."""
        if not replaces:
            grid.put(self.total, rows)
            return
        if not self._end.sublayer.post:
            rows = rows - self.read(Tap.RESIDUAL, None)[grid.rows].float()
        if self._end.behind is None:
            grid.put(self.total, rows)
        else:
            self.now.instead.setdefault(self._end.behind.site.name, []).append((grid, rows))

    def changed(self) -> None:
        """What was made of `total` is made anew when it is read again."""
        self._made.clear()

    def close(self) -> None:
        """Lets go of what was kept for the adapters here."""
        if self.ending is not None and not self.ending.read_later(self.rowmap):
            self.now.kept.pop(self.ending.first.site.name, None)
            self.now.kept.pop(self.ending.norm.site.name, None)

    @property
    def _end(self) -> Ending:
        assert self.ending is not None, "an adapter reads beyond a site at which no sublayer ends"
        return self.ending

    def _sum(self) -> torch.Tensor:
        return self.total + self.read(Tap.RESIDUAL, None)

    def _normed(self, norm: str | None) -> torch.Tensor:
        module = self._end.norm if norm is None else self._end.norms(norm)
        return module.normed(self.read(Tap.SUM, None).to(self.dtype), self.rowmap)
