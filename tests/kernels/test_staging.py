"""Staging: pieces of any dtype and shape arrive as they were put down, in one copy."""

import pytest
import torch

from deltaserve_kernels.attention import Sequence, Sequences
from deltaserve_kernels.gpu import cut
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.staging import Staging

CPU = torch.device("cpu")


class Elsewhere(Staging):
    """The path of a device that is not the host, whose memory is the host's all the same."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))

    def _copied(self, pieces, ends):
        self.device = CPU
        try:
            return super()._copied(pieces, ends)
        finally:
            self.device = torch.device("meta")


@pytest.mark.parametrize("make", [lambda: Staging(CPU), Elsewhere])
def test_pieces_arrive_whole_and_aligned(make):
    staging, found = make(), {}
    given = {
        "one": torch.tensor([7]),
        "none": torch.empty(0, dtype=torch.int64),
        "small": torch.arange(5, dtype=torch.int32),
        "wide": torch.arange(21).view(3, 7),
        "last": torch.tensor([[2**40, -1]]),
    }
    for name, piece in given.items():
        staging.put(piece, piece.dtype, lambda tensor, name=name: found.update({name: tensor}))
    staging.put([3, 1], torch.int32, lambda tensor: found.update(listed=tensor))
    assert found == {}
    staging.ship()
    assert list(found) == [*given, "listed"]
    for name, piece in given.items():
        assert found[name].dtype is piece.dtype and torch.equal(found[name], piece), name
    assert found["listed"].tolist() == [3, 1] and found["listed"].dtype is torch.int32
    if isinstance(staging, Elsewhere):
        assert staging.copies == 1
        begin = found["one"].storage_offset() * 8
        assert all((t.storage_offset() * t.element_size() - begin) % 16 == 0 for t in found.values())
    staging.ship()
    assert len(found) == 6


def test_what_is_shipped_stays_when_the_next_is():
    staging, found = Elsewhere(), []
    for number in range(5):
        staging.put([number] * 9, torch.int64, found.append)
        staging.ship()
    assert [tensor.tolist() for tensor in found] == [[number] * 9 for number in range(5)]


def test_a_map_and_a_cut_that_were_made_ahead_are_those_that_kernels_would_make():
    runs, asked = [(3, 2), (-1, 1), (0, 5), (3, 4)], (0, 1, 4, 16)
    ahead, alone, staging = RowMap.of(runs, CPU), RowMap.of(runs, CPU), Elsewhere()
    ahead.stage(staging, asked)
    items = (Sequence(0, 2, 3, 0, 5, 3, True), Sequence(2, 1, 600, 9, 601, -1, True), Sequence(3, 9, 0, 3, 9, 0, False))
    one, other = Sequences(items, True), Sequences(items, True)
    key = cut.Key(cut.Heads(4, 2, 8), True, False)
    cut.stage(one, key, staging)
    staging.ship()
    assert staging.copies == 1
    assert ahead.asked == frozenset(asked)
    assert torch.equal(ahead.slots, alone.slots) and torch.equal(ahead.order, alone.order)
    for height in asked[1:]:
        assert ahead.tiles(height) is ahead.tiles(height) and torch.equal(ahead.tiles(height), alone.tiles(height))
    cuts = cut.of(other, key.heads, key.fp32, key.biased, CPU)
    assert cut.of(one, key.heads, key.fp32, key.biased, CPU) is one.kept[key]
    for mine, theirs in zip(one.kept[key].all, cuts.all, strict=True):
        assert torch.equal(mine.tiles, theirs.tiles) and mine.parts == theirs.parts
        assert (mine.split is None) is (theirs.split is None)
        assert mine.split is None or torch.equal(mine.split, theirs.split)
    assert RowMap.of([(-1, 4)], CPU).asked == frozenset()


def test_only_what_was_asked_for_is_asked():
    rowmap = RowMap.of([(1, 3)], CPU)
    rowmap.tiles(4)
    assert rowmap.asked == {4}
    assert rowmap.slots.tolist() == [1, 1, 1]
    assert rowmap.asked == {0, 4}
