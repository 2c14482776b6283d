"""The adapters at one site: those of one form are computed together, one after the other where a slot has several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from deltaserve.backbone import gates
from deltaserve.backbone.ending import Ending, View
from deltaserve.backbone.gates import GateTable
from deltaserve.deltas.adapters import Adapter, Bottleneck, OwnNorm, Positions, Tap
from deltaserve.deltas.sites import Axis
from deltaserve_kernels import bottleneck, fusion, ownnorm
from deltaserve_kernels.activations import number_of
from deltaserve_kernels.bottleneck import BottleneckTable
from deltaserve_kernels.fusion import FusionTable
from deltaserve_kernels.ownnorm import NormTable
from deltaserve_kernels.rowmap import RowMap


@dataclass(frozen=True)
class Form:
    """What is no tensor of an adapter, and no number of its members'. `query`: of a Fusion, else None."""

    inputs: tuple[Tap, ...]
    carry: Tap | None
    carry_inside: bool
    after: bool
    replaces: bool
    norm: str | None
    carry_scale: float = 1.0
    gated: bool = False
    positions: Positions | None = None
    query: Tap | None = None
    members_carry: bool = False

    @classmethod
    def of(cls, adapter: Adapter) -> "Form":
        after = adapter.after is not None
        common = partial(
            cls,
            carry=adapter.carry,
            carry_inside=after and adapter.carry_inside,
            after=after,
            replaces=adapter.replaces,
            norm=adapter.norm,
        )
        if isinstance(adapter, Bottleneck):
            scale, gated = adapter.carry_scale, adapter.gate is not None
            return common(inputs=(adapter.input,), carry_scale=scale, gated=gated, positions=adapter.positions)
        inputs = tuple(member.input for member in adapter.members)
        return common(
            inputs=inputs,
            carry_scale=adapter.carry_scale,
            members_carry=adapter.members_carry,
            query=adapter.query_tap,
        )

    def at(self, ending: Ending | None) -> "Form":
        """The same at an `ending`: where the stream goes on as h + r, to make it z + (h + r) is to add z to h."""
        summed = self.carry is Tap.SUM and self.carry_scale == 1 and not self.after and not self.members_carry
        if self.replaces and summed and ending is not None and ending.behind is None:
            return replace(self, carry=Tap.OUTPUT, replaces=False)
        return self

    @property
    def taps(self) -> frozenset[Tap]:
        return frozenset(tap for tap in (*self.inputs, self.carry, self.query) if tap is not None)

    @property
    def adds(self) -> bool:
        """Whether it does nothing but add to what the site gives."""
        carried = self.carry is Tap.OUTPUT and self.carry_scale == 1 and not self.members_carry
        return carried and not self.after and not self.replaces


class Group:
    """Adapters of one form, a slot's at most one."""

    def __init__(self, form: Form, slots: int, device: torch.device) -> None:
        self.form = form
        self.members = tuple(BottleneckTable(slots, device) for _ in form.inputs)
        self.after = NormTable(slots, device)
        self.gates = GateTable(slots, device)
        self.fusion = None if form.query is None else FusionTable(slots, device)

    def put(self, slot: int, adapter: Adapter) -> None:
        members = (adapter,) if isinstance(adapter, Bottleneck) else adapter.members
        for table, member in zip(self.members, members, strict=True):
            weights = (member.down, member.up, member.down_bias, member.up_bias)
            scalars = (member.scale, float(number_of(member.activation)))
            norm, eps = _norm(member.before)
            table.put(slot, weights + norm, scalars + eps)
        if adapter.after is not None:
            self.after.put(slot, *_norm(adapter.after))
        if isinstance(adapter, Bottleneck):
            if adapter.gate is not None:
                self.gates.put(slot, (adapter.gate.weight, adapter.gate.bias))
        else:
            assert self.fusion is not None
            asks = (adapter.query, adapter.query_bias, adapter.key, adapter.value)
            self.fusion.put(slot, asks, (float(len(members)),))

    def discard(self, slot: int) -> None:
        for table in (*self.members, self.after, self.gates, self.fusion):
            if table is not None:
                table.discard(slot)

    def apply(self, view: View) -> None:
        form = self.form
        rowmap = view.rowmap
        if self.members[0].touches(rowmap):
            rowmap = view.reached(form.positions)
        if not self.members[0].touches(rowmap):
            return
        if form.adds:
            self._add(view.total, view, rowmap)
            return
        z = torch.zeros_like(view.total)
        self._add(z, view, rowmap)
        carry = None if form.carry is None or form.members_carry else view.read(form.carry, form.norm)
        if carry is not None and form.carry_inside:
            z.add_(carry, alpha=form.carry_scale)
        ownnorm.apply(z, rowmap, self.after)
        if carry is not None and not form.carry_inside:
            z.add_(carry, alpha=form.carry_scale)
        grid = rowmap.grid([run for run, _ in self.members[0].entries(rowmap)])
        view.put(grid, z[grid.rows], form.replaces)

    def _add(self, y: torch.Tensor, view: View, rowmap: RowMap) -> None:
        """y += what the network gives, without the carry."""
        form = self.form
        if self.fusion is None:
            u = view.read(form.inputs[0], form.norm)
            bottleneck.apply(y, u, rowmap, self.members[0], self._gates(u, view) if form.gated else None)
            return
        members = y.new_zeros(y.shape[0], len(self.members), y.shape[1])
        for number, table in enumerate(self.members):
            bottleneck.apply(members[:, number], view.read(form.inputs[number], form.norm), rowmap, table)
        if form.members_carry and form.carry is not None:
            members.add_(view.read(form.carry, form.norm).unsqueeze(1), alpha=form.carry_scale)
        assert form.query is not None
        fusion.apply(y, view.read(form.query, form.norm), members, rowmap, self.fusion)

    def _gates(self, u: torch.Tensor, view: View) -> torch.Tensor:
        """Each row's, of all rows of its sequence, whichever are edited."""
        assert view.axis is Axis.TOKENS and view.now.plan is not None
        sequences = view.now.plan.attention[Axis.TOKENS]
        return gates.by_row(gates.means(u, view.rowmap, self.gates, sequences), sequences, u)


class Chain:
    """The adapters at one site, in stages: a slot's first in the first, what comes behind it in those that follow.

    `ending`: of the sublayer that ends here, if one does.
    """

    ending: Ending | None = None

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        self._stages: list[dict[Form, Group]] = []
        self._here: set[int] = set()

    def put(self, slot: int, adapters: Sequence[Adapter]) -> None:
        """Publishes a slot's adapters in their order."""
        self._here.add(slot)
        forms = [Form.of(adapter).at(self.ending) for adapter in adapters]
        if self.ending is not None:
            behind = self.ending.behind
            assert behind is None or not any(form.replaces for form in forms[:-1]), (
                f"an adapter behind one whose result stands for what {behind.site.name} gives"
            )
            for form in forms:
                self.ending.prepare(slot, form.taps, form.replaces)
        for number, (form, adapter) in enumerate(zip(forms, adapters, strict=True)):
            if number == len(self._stages):
                self._stages.append({})
            stage = self._stages[number]
            if form not in stage:
                stage[form] = Group(form, self._slots, self._device)
            stage[form].put(slot, adapter)

    def discard(self, slot: int) -> None:
        """Takes a slot's adapters back, where there are any."""
        if slot not in self._here:
            return
        self._here.discard(slot)
        for stage in self._stages:
            for form, group in list(stage.items()):
                group.discard(slot)
                if not len(group.members[0]):
                    del stage[form]
        while self._stages and not self._stages[-1]:
            self._stages.pop()
        if self.ending is not None:
            self.ending.forget(slot)

    def touches(self, rowmap: RowMap) -> bool:
        return bool(self._here) and not self._here.isdisjoint(rowmap.active)

    def apply(self, view: View) -> None:
        """`view.total` as the adapters leave it."""
        for stage in self._stages:
            for group in stage.values():
                group.apply(view)
            view.changed()
        view.close()


def _norm(own: OwnNorm | None) -> tuple[tuple[torch.Tensor, ...], tuple[float, ...]]:
    return ((), ()) if own is None else ((own.weight, own.bias), (own.eps,))
