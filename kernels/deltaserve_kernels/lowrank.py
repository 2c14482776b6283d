"""LowRank: y += scale · outer ⊙ (x Aᵀ D Bᵀ) for each row's own. LoRA, VeRA and all else of low rank.

D is diag(inner) where inner is [r], and innerᵀ where it is [r, r].
"""

from collections.abc import Hashable, Sequence

import torch

from deltaserve_kernels.dispatch import Implementation, path
from deltaserve_kernels.rowmap import Grid, RowMap
from deltaserve_kernels.slots import Entry, SlotTable
from deltaserve_kernels.stacks import Found, Group, Groups, Stack, Stacks, bucket, grouped

_Pair = tuple[torch.Tensor, torch.Tensor]
_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
_Share = tuple[_Place, _Place, bool]
"""Of A, of B, and whether inner is [r, r]."""
_PADDED = 1 << 17
"""Zeros that a product may have to read, in numbers: half a megabyte, some 50 µs."""


class LowRankTable(SlotTable):
    """Columns A [r, in], B [out, r], inner [r] or [r, r] and outer [out], these two or None for ones; scalar scale.

    Ranks differ freely between slots. Slots with inner or outer may have one A and one B in common.
    """

    strided = frozenset((0, 1))

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(4, capacity, device)
        self._shares: dict[int, _Share] = {}
        self._stacks, self._scales = Stacks(_stacked), Stacks(_scaled)

    def put(self, slot: int, tensors: tuple[torch.Tensor | None, ...], scalars: tuple[float, ...] = ()) -> None:
        """See `SlotTable.put`; A and B may come alone."""
        a, b, inner, outer = tensors if len(tensors) == 4 else (*tensors, None, None)
        super().put(slot, (a, b, inner, outer), scalars)
        assert a is not None and b is not None
        if inner is not None or outer is not None:
            self._shares[slot] = _place(a), _place(b), inner is not None and inner.ndim == 2

    def drop(self, slot: int) -> None:
        super().drop(slot)
        self._shares.pop(slot, None)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the stacked copies."""
        return self._stacks.nbytes + self._scales.nbytes

    def split(self, rowmap: RowMap) -> tuple[Found, list[Found]]:
        """The runs without inner and outer; and the others, those of one A and one B together. All in row order."""
        alone: Found = []
        sharing: dict[_Share, Found] = {}
        for run, entry in self.entries(rowmap):
            share = self._shares.get(run.slot)
            (alone if share is None else sharing.setdefault(share, [])).append((run, entry))
        return alone, list(sharing.values())

    def stack(self, group: Group) -> _Pair:
        """fp32 Aᵀ [slots, in, r] and scale · Bᵀ [slots, r, out], ranks padded with zeros to the largest."""
        return _both(self._stacks.of(group, self.generation))

    def scales(self, group: Group) -> _Pair:
        """fp32 scale · inner [slots, r] or [slots, r, r] and outer [slots, out], of slots that share A and B."""
        return _both(self._scales.of(group, self.generation))


def apply(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    """y += scale · outer ⊙ (x Aᵀ D Bᵀ) in place.

    y fp32 [rows, out]; x [rows, in], any float dtype. Products and sums are fp32. Bare rows are not touched.
    """
    if not table.touches(rowmap):
        return
    path(_PATHS, y.device)(y, x, rowmap, table)


def reference(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    for run, entry in table.entries(rowmap):
        a, _ = _weights(entry)
        y[run.start : run.stop] += expanded(x[run.start : run.stop].float() @ a.T, entry)


def expanded(hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
    """scale · outer ⊙ (h D Bᵀ), fp32 [rows, out], of h = x Aᵀ, fp32 [rows, r]."""
    _, b = _weights(entry)
    inner, outer = _vectors(entry)
    hidden = hidden * inner if inner.ndim == 1 else hidden @ inner.T
    return entry.scalars[0] * outer * (hidden @ b.T)


def cpu(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    groups, sharing = table.planned("", rowmap, lambda: divided(table, rowmap))
    for group in sharing:
        _shared(y, x, group, table)
    for group in groups.together:
        down, up = table.stack(group)
        added = torch.bmm(torch.bmm(group.grid.taken(x).float(), down), up)
        group.grid.add(y, group.grid.given(added))
    for run, entry in groups.alone:
        a, b = _weights(entry)
        part = y[run.start : run.stop]
        part.addmm_(x[run.start : run.stop].float() @ a.T, b.T, alpha=entry.scalars[0])


def divided(table: LowRankTable, rowmap: RowMap) -> tuple[Groups, list[Group]]:
    """What is alone, in groups of two batched products each over stacked weights; and what shares A and B."""
    alone, sharing = table.split(rowmap)
    return grouped(alone, rowmap, _bucket, _merged), [Group.of(found, None, rowmap) for found in sharing]


def _bucket(entry: Entry) -> int:
    a = entry.tensors[0]
    assert a is not None
    return bucket(int(a.shape[0]))


def _merged(buckets: dict[Hashable, Found]) -> dict[Hashable, Found]:
    """Buckets join the next larger one where the zeros that they are padded with cost less than products of their own.

    Runs stay in row order.
    """
    merged: list[tuple[Hashable, Found]] = []
    for key, found in sorted(buckets.items(), key=lambda item: _rank(item[1]), reverse=True):
        if merged:
            larger = merged[-1]
            zeros = sum((_rank(larger[1]) - _rank([each])) * _width(each[1]) for each in found)
            if zeros <= _PADDED:
                merged[-1] = larger[0], sorted([*larger[1], *found], key=lambda each: each[0].start)
                continue
        merged.append((key, found))
    return dict(merged)


def _rank(found: Found) -> int:
    return max(int(a.shape[0]) for _, entry in found if (a := entry.tensors[0]) is not None)


def _width(entry: Entry) -> int:
    a, b = entry.tensors[:2]
    assert a is not None and b is not None
    return int(a.shape[1] + b.shape[0])


def _shared(y: torch.Tensor, x: torch.Tensor, group: Group, table: LowRankTable) -> None:
    """Two products for the rows of all slots that have one A and one B."""
    grid, (a, b) = group.grid, _weights(group.found[0][1])
    inner, outer = table.scales(group)
    hidden = x[grid.rows].float() @ a.T
    if inner.ndim == 3:
        counts = [run.rows for run, _ in group.found]
        hidden = torch.cat([part @ one.T for part, one in zip(hidden.split(counts), inner, strict=True)])
    else:
        hidden.mul_(_by_row(inner, grid))
    grid.add(y, (hidden @ b.T).mul_(_by_row(outer, grid)))


def _by_row(scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """A run's scales for each of its rows; those of a single run broadcast."""
    return scales if grid.runs == 1 or grid.depth == 1 else scales.index_select(0, grid.each)


def _both(stack: Stack) -> _Pair:
    one, other = stack
    assert one is not None and other is not None
    return one, other


def _weights(entry: Entry) -> _Pair:
    a, b = entry.tensors[:2]
    assert a is not None and b is not None
    return a.float(), b.float()


def _vectors(entry: Entry) -> _Pair:
    """inner [r] or [r, r] and outer [out], ones where there are none."""
    a, b, inner, outer = entry.tensors
    assert a is not None and b is not None
    return (
        torch.ones(a.shape[0], device=a.device) if inner is None else inner.float(),
        torch.ones(b.shape[0], device=b.device) if outer is None else outer.float(),
    )


def _place(tensor: torch.Tensor) -> _Place:
    """Equal for two tensors that are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _stacked(entries: Sequence[Entry]) -> _Pair:
    pairs = [_weights(entry) for entry in entries]
    rank = max(a.shape[0] for a, _ in pairs)
    down = torch.zeros(len(pairs), pairs[0][0].shape[1], rank)
    up = torch.zeros(len(pairs), rank, pairs[0][1].shape[0])
    for i, ((a, b), entry) in enumerate(zip(pairs, entries, strict=True)):
        down[i, :, : a.shape[0]] = a.T
        up[i, : a.shape[0]] = b.T * entry.scalars[0]
    return down, up


def _scaled(entries: Sequence[Entry]) -> _Pair:
    pairs = [_vectors(entry) for entry in entries]
    inner = torch.stack([inner * entry.scalars[0] for (inner, _), entry in zip(pairs, entries, strict=True)])
    return inner, torch.stack([outer for _, outer in pairs])


def triton(y: torch.Tensor, x: torch.Tensor, rowmap: RowMap, table: LowRankTable) -> None:
    from deltaserve_kernels.gpu import lowrank

    lowrank.launch(y, x, rowmap, table)


_PATHS = {Implementation.REFERENCE: reference, Implementation.CPU: cpu, Implementation.TRITON: triton}
