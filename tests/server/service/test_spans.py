"""The best spans, beside every span that there is."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.service.spans import Found, allowed, best
from deltaserve.service.text import Encoding


def every(
    rows: Sequence[Sequence[float]], within: Sequence[bool], beside: Sequence[bool], longest: int
) -> list[tuple[float, int, int]]:
    """(probability, start, end) of all spans, the likeliest first: softmax, outer product, and the rules one by one."""
    scores = torch.tensor(rows, dtype=torch.float64)
    scores[~(torch.tensor(within) | torch.tensor(beside))] = -math.inf
    products = torch.outer(scores[:, 0].softmax(0), scores[:, 1].softmax(0))
    places = range(len(rows))
    found = [
        (float(products[i, j]), i, j) for i in places for j in places[i : i + longest] if all(within[i : j + 1])
    ]  # fmt: skip
    return sorted(found, key=lambda one: (-one[0], one[1], one[2]))


def check(ours: Sequence[Found], wanted: Sequence[tuple[float, int, int]], rows: Sequence[Sequence[float]]) -> None:
    assert len(ours) == len(wanted)
    for one, (probability, start, end) in zip(ours, wanted, strict=True):
        assert (one.start, one.end) == (start, end)
        assert math.isclose(one.probability, probability, rel_tol=1e-9)
        assert one.logit == rows[start][0] + rows[end][1]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_the_best_of_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 24))
    number = st.floats(-9, 9, width=32)
    rows = data.draw(st.lists(st.tuples(number, number), min_size=count, max_size=count))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    within, beside = data.draw(flags), data.draw(flags)
    top_k, longest = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    ours = best(rows, within, beside, top_k, longest)
    wanted = every(rows, within, beside, longest) if any(within) else []
    for one in ours:
        assert all(within[one.start : one.end + 1]) and one.end - one.start < longest
    assert len({(one.start, one.end) for one in ours}) == len(ours) == min(top_k, len(wanted))
    theirs = {(start, end): probability for probability, start, end in wanted}
    for one, (probability, _, _) in zip(ours, wanted, strict=False):
        assert math.isclose(one.probability, probability, rel_tol=1e-9)
        assert math.isclose(one.probability, theirs[one.start, one.end], rel_tol=1e-9)


def test_in_the_order_of_their_probability() -> None:
    torch.manual_seed(3)
    rows = (3 * torch.randn(40, 2)).tolist()
    within = [False, *[True] * 20, False, *[True] * 18]
    beside = [True, *[False] * 39]
    ours = best(rows, within, beside, 64, 7)
    check(ours, every(rows, within, beside, 7)[:64], rows)
    assert not any(one.start <= 21 <= one.end or one.start == 0 for one in ours)


def test_what_stands_beside_takes_its_share() -> None:
    rows, within = [[9.0, 9.0], [1.0, 2.0], [2.0, 1.0]], [False, True, True]
    (alone,) = best(rows, within, [False] * 3, 1, 5)
    (shared,) = best(rows, within, [True, False, False], 1, 5)
    assert (alone.start, alone.end, alone.logit) == (shared.start, shared.end, shared.logit)
    assert shared.probability < 1e-5 < alone.probability


def test_equal_ones_come_in_the_order_of_the_text() -> None:
    ours = best([[0.5, 0.5]] * 3000, [True] * 3000, [False] * 3000, 5, 512)
    assert [(one.start, one.end) for one in ours] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_fail_nobody(value: float) -> None:
    ours = best([[value, value], [1.0, value], [1.0, 1.0]], [True] * 3, [False] * 3, 3, 3)
    assert len(ours) <= 3


def test_nothing_is_found_where_nothing_may_be() -> None:
    assert best([[1.0, 1.0]], [False], [True], 1, 15) == []


def test_allowed() -> None:
    pair = Encoding((1, 8, 2, 9, 4, 2), (0, 0, 0, 1, 1, 1), (True, False, True, False, False, True), (0, 0, 0, 1, 1, 1))
    assert allowed(pair, 1) == [False, False, False, True, True, False]
    assert allowed(pair, None) == [False, True, False, True, True, False]
    assert allowed(Encoding((5, 6), (0, 1)), 1) == [False, True]
    assert allowed(Encoding((5, 6)), None) == [True, True]
