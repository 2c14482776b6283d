"""Ranges tile the space, whatever is taken and given back."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.pool.extents import Extents


def test_first_fit_and_joined_holes():
    extents = Extents(100, 10)
    a, b, c = (extents.take(n) for n in (15, 30, 40))
    assert (a, b, c, extents.used, extents.take(20)) == (0, 20, 50, 90, None)
    assert extents.give(b) == 30 and extents.take(35) is None and extents.take(1) == 20
    extents.check()
    assert [extents.give(start) for start in (a, c, 20)] == [20, 40, 10]
    extents.check()
    assert extents.take(100) == 0


def test_capacity_is_whole_ranges_and_may_be_nothing():
    assert Extents(37, 16).capacity == 32
    empty = Extents(0, 16)
    assert empty.take(1) is None and empty.used == 0
    empty.check()


def test_an_unknown_range_cannot_be_given_back():
    extents = Extents(64, 16)
    start = extents.take(8)
    with pytest.raises(KeyError):
        extents.give(16)
    extents.give(start)
    with pytest.raises(KeyError):
        extents.give(start)


@settings(max_examples=200, deadline=None)
@given(
    capacity=st.integers(0, 600),
    align=st.sampled_from([1, 3, 16]),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 120))),
)
def test_ranges_tile_the_space(capacity: int, align: int, moves: list[tuple[bool, int]]):
    extents = Extents(capacity, align)
    taken: dict[int, int] = {}
    for take, n in moves:
        if take:
            start = extents.take(n)
            free = extents.capacity - extents.used
            if start is None:
                assert free < extents.capacity or extents.rounded(n) > extents.capacity
            else:
                assert start % align == 0
                taken[start] = extents.rounded(n)
        elif taken:
            start = sorted(taken)[n % len(taken)]
            assert extents.give(start) == taken.pop(start)
        extents.check()
        assert extents.used == sum(taken.values())
        ranges = sorted(taken.items())
        assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    for start in taken:
        extents.give(start)
    extents.check()
    assert extents.used == 0 and (extents.capacity == 0 or extents.take(extents.capacity) == 0)
