"""Each primitive at one site: what it costs, and a call that does it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltaserve_kernels import affine, block, cost, dense, embed, lowrank, rows, sparse
from deltaserve_kernels.attention import PrefixTable, Sequence, Sequences, attend
from deltaserve_kernels.attention.cost import cost as attention_cost
from deltaserve_kernels.cost import Cost
from deltaserve_kernels.rowmap import RowMap

SLOTS = 64
SPLIT = 8
"""Of the sum over inputs, at few rows."""


@dataclass(frozen=True)
class Size:
    """Of a site and of what is there: `density` of Sparse; heads of attention."""

    width: int
    rank: int
    block: int
    density: float
    heads: int
    kv_heads: int
    head_dim: int


FULL = Size(4096, 16, 32, 0.01, 32, 8, 128)
TINY = Size(48, 3, 4, 0.05, 4, 2, 16)


@dataclass(frozen=True)
class Work:
    """Requests of so many rows each, over `distinct` deltas; decoding, each has `context` tokens in the cache."""

    name: str
    requests: int
    rows: int
    distinct: int
    context: int = 0

    def rowmap(self, device: torch.device) -> RowMap:
        slots = sorted(number % self.distinct for number in range(self.requests))
        return RowMap.of([(slot, self.rows) for slot in slots], device)

    @property
    def length(self) -> int:
        return self.context + self.rows

    @property
    def sequences(self) -> Sequences:
        spans = (
            Sequence(n * self.rows, self.rows, self.context, n * self.length, self.length, n % self.distinct, True)
            for n in range(self.requests)
        )
        return Sequences(tuple(spans), causal=True)


WORKS = (
    Work("decode 32, 32 deltas", 32, 1, 32, 1023),
    Work("decode 32, 1 delta", 32, 1, 1, 1023),
    Work("prefill 8 × 256, 8 deltas", 8, 256, 8),
)
TINY_WORKS = (Work("decode 3, 3 deltas", 3, 1, 3, 20), Work("prefill 2 × 20, 2 deltas", 2, 20, 2))


@dataclass(frozen=True, eq=False)
class Primitive:
    """`run` does it once, in place where it can; on the meta device it is not to be called."""

    name: str
    cost: Cost
    run: Callable[[], object]


def primitives(work: Work, size: Size, device: torch.device, dtype: torch.dtype) -> list[Primitive]:
    """Rows and deltas of one dtype; what deltas add is fp32."""
    rowmap, width, each = work.rowmap(device), size.width, dtype.itemsize

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=of, device=device) * 0.02

    def places(count: int) -> torch.Tensor:
        """Sorted by output, as many for each."""
        if device.type == "meta":
            return torch.empty(2, count, dtype=torch.int32, device=device)
        outputs = torch.arange(count, device=device) * width // count
        return torch.stack((outputs, torch.randint(0, width, (count,), device=device))).int()

    x, y = normal(rowmap.rows, width), normal(rowmap.rows, width, of=torch.float32)
    weight, few = normal(width, width), int(width * width * size.density)
    low, vectors = lowrank.LowRankTable(SLOTS, device), affine.AffineTable(SLOTS, device)
    whole, sparsed = dense.DenseTable(SLOTS, device), sparse.SparseTable(SLOTS, device)
    turns, own = block.BlockTable(SLOTS, device), rows.RowsTable(SLOTS, device)
    for slot in range(work.distinct):
        low.put(slot, (normal(size.rank, width), normal(width, size.rank)), (1.0,))
        vectors.put(slot, (normal(width) + 1, normal(width) + 1, normal(width)))
        whole.put(slot, (normal(width, width), normal(width)), (0.0,))
        sparsed.put(slot, (places(few), normal(few)))
        turns.put(slot, (normal(width // size.block, size.block, size.block),))
        own.put(slot, (torch.zeros(1, dtype=torch.int32, device=device), normal(1, width)))
    ids = torch.zeros(rowmap.rows, dtype=torch.int64, device=device)
    nobody = embed.EmbeddingTable(SLOTS, device)
    query = normal(rowmap.rows, size.heads, size.head_dim)
    keys, values = (normal(rowmap.rows, size.kv_heads, size.head_dim) for _ in range(2))
    tokens = work.requests * work.length
    cache = (normal(tokens, size.kv_heads, size.head_dim), normal(tokens, size.kv_heads, size.head_dim))
    prefix, sequences = PrefixTable(SLOTS, device), work.sequences
    linear = torch.nn.functional.linear
    return [
        Primitive(
            "linear (the backbone's)", cost.linear(rowmap.rows, width, width, each), lambda: linear(x, weight)
        ),
        Primitive(
            f"low rank, r {size.rank}", cost.low_rank(rowmap, low, each, SPLIT),
            lambda: lowrank.apply(y, x, rowmap, low),
        ),
        Primitive(
            "affine, in", cost.scale_input(rowmap, vectors, each), lambda: affine.scale_input(x, rowmap, vectors)
        ),
        Primitive("affine, out", cost.scale_output(rowmap, vectors), lambda: affine.scale_output(y, rowmap, vectors)),
        Primitive("dense", cost.dense(rowmap, whole, each), lambda: dense.apply(y, x, rowmap, whole)),
        Primitive(
            f"sparse, {size.density:.0%}", cost.sparse(rowmap, sparsed, width, each),
            lambda: sparse.apply(y, x, rowmap, sparsed),
        ),
        Primitive(
            f"block, b {size.block}", cost.block(rowmap, turns, width, each), lambda: block.turned(x, rowmap, turns)
        ),
        Primitive(
            "embed", cost.looked_up(rowmap.rows, width, each),
            lambda: embed.rows_of(ids, rowmap, weight, nobody, own),
        ),
        Primitive(
            "attention", attention_cost(sequences, size.heads, size.kv_heads, size.head_dim, each),
            lambda: attend(query, keys, values, sequences, cache=cache, prefix=prefix, scale=0.1),
        ),
    ]  # fmt: skip
