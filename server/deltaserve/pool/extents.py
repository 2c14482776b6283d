"""Which parts of a linear space are taken: first fit, holes joined when they are given back. No torch here."""

from bisect import bisect_left


class Extents:
    """Allocates ranges [start, start + size) of [0, capacity), each start a multiple of `align`."""

    def __init__(self, capacity: int, align: int = 1) -> None:
        assert capacity >= 0 and align > 0
        self.capacity = capacity - capacity % align
        self._align = align
        self._holes: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self._taken: dict[int, int] = {}
        self.used = 0

    def rounded(self, size: int) -> int:
        """What a range of `size` takes."""
        return -(-max(size, 1) // self._align) * self._align

    def take(self, size: int) -> int | None:
        """The start of a fresh range, or None where no hole is large enough."""
        want = self.rounded(size)
        for i, (start, length) in enumerate(self._holes):
            if length >= want:
                if length == want:
                    del self._holes[i]
                else:
                    self._holes[i] = (start + want, length - want)
                self._taken[start] = want
                self.used += want
                return start
        return None

    def give(self, start: int) -> int:
        """Gives a range back; returns its size."""
        size = self._taken.pop(start)
        self.used -= size
        i = bisect_left(self._holes, (start, 0))
        begin, end = start, start + size
        if i < len(self._holes) and self._holes[i][0] == end:
            end += self._holes.pop(i)[1]
        if i > 0 and sum(self._holes[i - 1]) == begin:
            begin = self._holes.pop(i - 1)[0]
            i -= 1
        self._holes.insert(i, (begin, end - begin))
        return size

    def check(self) -> None:
        """Asserts that holes and taken ranges tile the space; for tests and idle moments."""
        ranges = sorted([*self._holes, *self._taken.items()])
        at = 0
        for start, size in ranges:
            assert start == at and size > 0
            at += size
        assert at == self.capacity and self.used == sum(self._taken.values())
        assert all(a[0] + a[1] < b[0] for a, b in zip(self._holes, self._holes[1:], strict=False))
