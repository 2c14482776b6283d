"""Which rows of a forward stand at an end of their sequence: what adapters with `Positions` edit."""

from bisect import bisect_right
from collections.abc import Iterator

from deltaserve.deltas.adapters import Positions, Reach
from deltaserve.deltas.sites import Axis
from deltaserve.plan import Now, Prompted
from deltaserve_kernels.attention.sequences import Sequence
from deltaserve_kernels.rowmap import BARE, RowMap

_NOT_PROMPTED = Prompted(0)


def reached(now: Now, axis: Axis, positions: Positions) -> RowMap:
    """The axis's map with the rows of `positions` alone; made once a forward.

    The last rows of a sequence can be told only where all of its rows are in this forward.
    """
    found = now.reached.get((axis, positions))
    if found is None:
        assert now.plan is not None and axis in now.plan.attention, f"no sequences are known of {axis} rows"
        prompted = now.prompted if axis is Axis.TOKENS else {}
        rowmap = now.plan.maps[axis]
        starts = [run.start for run in rowmap.runs]
        runs: list[tuple[int, int]] = []
        at = 0
        for sequence in now.plan.attention[axis].items:
            if sequence.slot == BARE:
                continue
            for first, end in _rows(sequence, positions, prompted.get(sequence.slot, _NOT_PROMPTED)):
                # Rows on which the slot does not act yet stand before its first.
                near = bisect_right(starts, end - 1) - 1
                run = rowmap.runs[near] if near >= 0 else None
                if run is not None and run.slot == sequence.slot and run.stop > first:
                    low, high = max(first, run.start), min(end, run.stop)
                    runs += [(BARE, low - at), (sequence.slot, high - low)]
                    at = high
        runs.append((BARE, rowmap.rows - at))
        found = now.reached[axis, positions] = RowMap.of(runs, rowmap.device)
    return found


def _rows(sequence: Sequence, positions: Positions, prompted: Prompted) -> Iterator[tuple[int, int]]:
    """Pieces [first, end) of the axis, in row order."""
    for low, high in _own(sequence, positions, prompted):
        # Rows behind the soft prompt stand so much later.
        for begin, stop, shift in ((0, prompted.place, 0), (prompted.place, high, prompted.rows)):
            first = max(max(low, begin) + shift, sequence.position)
            end = min(min(high, stop) + shift, sequence.position + sequence.queries)
            if first < end:
                offset = sequence.query_start - sequence.position
                yield first + offset, end + offset


def _own(sequence: Sequence, positions: Positions, prompted: Prompted) -> list[tuple[int, int]]:
    """Pieces [low, high) of what a sequence has of its own, counted without the soft prompt."""
    first = positions.first
    if not positions.last:
        return [] if positions.reach is Reach.LAST else [(0, first)]
    assert sequence.position == 0, "the last rows of a sequence that is not there as a whole"
    whole = sequence.queries - prompted.rows
    begin = max(whole - positions.last, 0)
    at_first, at_last = (0, min(first, begin)), (begin, whole)
    return {Reach.FIRST: [at_first], Reach.LAST: [at_last], Reach.BOTH: [at_first, at_last]}[positions.reach]
