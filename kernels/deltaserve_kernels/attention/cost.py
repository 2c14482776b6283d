"""What attention costs at least: bytes of device memory that must be moved, and floating point operations."""

from deltaserve_kernels.attention.sequences import Sequence, Sequences
from deltaserve_kernels.cost import Cost


def cost(
    sequences: Sequences,
    heads: int,
    kv_heads: int,
    width: int,
    size: int,
    prefixes: dict[int, int] | None = None,
    window: int | None = None,
) -> Cost:
    """Of one call of `attend`, for rows of `size` bytes an element; `prefixes`: rows of prefix by slot.

    flops = 4 · width · heads · pairs, a pair being a query and a key that it sees: q kᵀ and p v; the softmax is not
    counted. Read are each query, and each key and value that some query of its sequence sees, once: heads of a group
    share them, tiles of one sequence find them in the cache. Partial sums and the cache's write are not counted.
    """
    queries, pairs, keys = 0, 0, 0
    for sequence in sequences.items:
        rows = (prefixes or {}).get(sequence.slot, 0)
        counts, seen = _seen(sequence, rows, sequences.causal, window)
        queries, pairs, keys = queries + sequence.queries, pairs + counts, keys + seen
    moved = queries * heads * width * size
    return Cost(moved + 2 * keys * kv_heads * width * size, moved, 4 * width * heads * pairs)


def _seen(sequence: Sequence, prefix: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Pairs of a query and a key or prefix row that it sees, and how many of these rows any query sees."""
    if not sequence.queries:
        return 0, 0
    last = sequence.position + sequence.queries - 1
    lowest = [
        -prefix if window is None else max(-prefix, index - window + 1) for index in range(sequence.position, last + 1)
    ]
    ahead = 1 if causal else window
    ends = [
        sequence.keys if ahead is None else min(sequence.keys, index + ahead)
        for index in range(sequence.position, last + 1)
    ]
    pairs = sum(max(0, end - low) for low, end in zip(lowest, ends, strict=True))
    return pairs, max(0, max(ends) - lowest[0])
