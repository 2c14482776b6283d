"""A module of the backbone at which deltas act. Its forward is changed in place, and only while some delta is there.

Nothing else about the module changes: its name, its weights, ties and type stay, and a backbone without resident
deltas runs transformers' own code. The exception are linears on `memory` rows: theirs is always ours, so that steps
that admit nobody do not read their weights for one dummy row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from deltaserve.backbone.adapters import Chain
from deltaserve.deltas.adapters import Bottleneck, Fusion
from deltaserve.deltas.primitives import SitePrimitive
from deltaserve.deltas.sites import Axis, Site
from deltaserve.plan import Now
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

Forward = Callable[[torch.Tensor], torch.Tensor]
Columns = tuple[tuple[torch.Tensor | None, ...], tuple[float, ...]]
"""What a table keeps of a primitive: tensors in the table's order, and scalars."""


class WrappedModule(ABC):
    """What all wrapped modules have in common; `linear`, `norm` and `embedding` say what their rows get.

    `tables` has one table for each primitive that can act here, by the name that `placed` gives it. A subclass
    implements `placed` and `applied`, and has `adapters` where these can stand.
    """

    tables: Mapping[str, SlotTable]
    adapters: Chain | None = None

    def __init__(self, site: Site, module: torch.nn.Module, now: Now) -> None:
        self.site = site
        self.module = module
        self.inner: Forward = module.forward
        self._now = now
        self._here: set[int] = set()
        self._kept: set[int] = set()
        if site.axis is Axis.MEMORY:
            module.forward = self._forward

    def placed(self, primitive: SitePrimitive) -> tuple[str, Columns]:
        """The table that a primitive goes to, and what it keeps there."""
        raise AssertionError(f"{type(primitive).__name__} cannot act at {self.site.name}")

    @abstractmethod
    def applied(self, x: torch.Tensor, rowmap: RowMap) -> torch.Tensor:
        """The module's output for rows of which some have something here."""

    def install(self, slot: int, primitives: Sequence[SitePrimitive]) -> None:
        """Publishes a slot's primitives, whose tensors are on the device. Of other than adapters one for each table."""
        adapters = [p for p in primitives if isinstance(p, Bottleneck | Fusion)]
        for primitive in primitives:
            if isinstance(primitive, Bottleneck | Fusion):
                continue
            table, (tensors, scalars) = self.placed(primitive)
            assert slot not in self.tables[table], f"two primitives for {table} at {self.site.name}"
            self.tables[table].put(slot, tensors, scalars)
        if adapters:
            assert self.adapters is not None, f"no adapter can act at {self.site.name}"
            self.adapters.put(slot, adapters)
        self._here.add(slot)
        self._follow()

    def remove(self, slot: int) -> None:
        """Takes a slot's primitives back; the last one gives the module its own forward back."""
        for table in self.tables.values():
            table.discard(slot)
        if self.adapters is not None:
            self.adapters.discard(slot)
        self._here.discard(slot)
        self._follow()

    def keep(self, slot: int) -> None:
        """From now on, a reference to what the module gets stays in `Now.kept` while this slot is active."""
        self._kept.add(slot)
        self._follow()

    def forget(self, slot: int) -> None:
        """Ends `keep`."""
        self._kept.discard(slot)
        self._follow()

    def _follow(self) -> None:
        """Gives the module our forward while something is here, else its own."""
        if self._here or self._kept or self.site.axis is Axis.MEMORY:
            self.module.forward = self._forward
        else:
            self.module.__dict__.pop("forward", None)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        rowmap = self._now.rowmap(self.site.axis)
        if self.site.axis is Axis.MEMORY and rowmap.rows == 0:
            return x.new_zeros(*x.shape[:-1], self.site.out_features)
        if rowmap.bare:
            return self.inner(x)
        if not self._kept.isdisjoint(rowmap.active):
            self._now.kept[self.site.name] = x.reshape(-1, x.shape[-1])
        if self._here.isdisjoint(rowmap.active):
            return self.inner(x)
        return self.applied(x, rowmap)
