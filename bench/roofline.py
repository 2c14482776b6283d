"""What a GPU could do at best: time by bytes and operations of what runs, and what deltas may keep of its speed.

Nothing here is measured: figures of chips are their makers', bytes and operations are counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from bench import scale, shapes
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import SiteType
from deltaserve_kernels import affine, block, cost, dense, lowrank, sparse
from deltaserve_kernels.attention import Sequence, Sequences
from deltaserve_kernels.attention.cost import cost as attention_cost
from deltaserve_kernels.cost import Cost
from deltaserve_kernels.rowmap import RowMap
from deltaserve_kernels.slots import SlotTable

META = torch.device("meta")


@dataclass(frozen=True)
class Chip:
    """`bandwidth` of its memory in bytes a second; `rates`: operations a second by dtype, dense, without sparsity."""

    name: str
    bandwidth: float
    rates: Mapping[torch.dtype, float]

    def seconds(self, told: Cost, dtype: torch.dtype) -> float:
        """The longer of moving and computing: Williams, Waterman and Patterson, doi 10.1145/1498765.1498785."""
        return max(told.moved / self.bandwidth, told.flops / self.rates[dtype])

    def bound(self, told: Cost, dtype: torch.dtype) -> str:
        return "memory" if told.moved / self.bandwidth >= told.flops / self.rates[dtype] else "arithmetic"


def _rates(half: float, single: float) -> Mapping[torch.dtype, float]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: single}


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("A100", 2.039e12, _rates(312e12, 19.5e12)),
        Chip("H100", 3.35e12, _rates(989e12, 67e12)),
        Chip("H200", 4.8e12, _rates(989e12, 67e12)),
    )
}
"""A100 80GB, H100 and H200 as SXM modules; nvidia.com, data sheets."""


def chip_of(name: str) -> Chip | None:
    """By what a driver calls it."""
    return next((chip for told, chip in CHIPS.items() if told in name), None)


WIDTH, RANK, BLOCK = 4096, 16, 32
DENSITY = 0.01
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_LOWRANK_SPLIT = 8


@dataclass(frozen=True)
class Work:
    """Requests of so many rows each, over `distinct` deltas; decoding, each has `context` tokens in the cache."""

    name: str
    requests: int
    rows: int
    distinct: int
    context: int = 0

    @property
    def rowmap(self) -> RowMap:
        slots = sorted(number % self.distinct for number in range(self.requests))
        return RowMap.of([(slot, self.rows) for slot in slots], META)

    @property
    def sequences(self) -> Sequences:
        length = self.context + self.rows
        return Sequences(
            tuple(
                Sequence(n * self.rows, self.rows, self.context, n * length, length, n % self.distinct, True)
                for n in range(self.requests)
            ),
            causal=True,
        )


WORKS = (
    Work("decode 32, 32 deltas", 32, 1, 32, 1023),
    Work("decode 32, 1 delta", 32, 1, 1, 1023),
    Work("prefill 8 × 256, 8 deltas", 8, 256, 8),
)


def primitives(work: Work) -> Mapping[str, Cost]:
    """Of one site WIDTH wide in bfloat16, deltas in bfloat16; of one attention of an 8 B Llama."""
    rowmap, size = work.rowmap, 2
    slots = range(work.distinct)

    def filled(table: SlotTable, tensors: Callable[[], tuple[torch.Tensor, ...]], *scalars: float) -> SlotTable:
        for slot in slots:
            table.put(slot, tensors(), scalars)
        return table

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    places = int(WIDTH * WIDTH * DENSITY)
    low = filled(lowrank.LowRankTable(64, META), lambda: (half(RANK, WIDTH), half(WIDTH, RANK)), 1.0)
    whole = filled(dense.DenseTable(64, META), lambda: (half(WIDTH, WIDTH), half(WIDTH)), 0.0)
    few = filled(
        sparse.SparseTable(64, META), lambda: (torch.empty(2, places, dtype=torch.int32, device=META), half(places))
    )
    turns = filled(block.BlockTable(64, META), lambda: (half(WIDTH // BLOCK, BLOCK, BLOCK),))
    vectors = filled(affine.AffineTable(64, META), lambda: (half(WIDTH), half(WIDTH), half(WIDTH)))
    return {
        "linear (the backbone's)": cost.linear(rowmap.rows, WIDTH, WIDTH, size),
        f"low rank, r {RANK}": cost.low_rank(rowmap, low, size, _LOWRANK_SPLIT),  # type: ignore[arg-type]
        "affine, in": cost.scale_input(rowmap, vectors, size),  # type: ignore[arg-type]
        "affine, out": cost.scale_output(rowmap, vectors),  # type: ignore[arg-type]
        "dense": cost.dense(rowmap, whole, size),  # type: ignore[arg-type]
        f"sparse, {DENSITY:.0%}": cost.sparse(rowmap, few, WIDTH, size),  # type: ignore[arg-type]
        f"block, b {BLOCK}": cost.block(rowmap, turns, WIDTH, size),  # type: ignore[arg-type]
        "embed": cost.looked_up(rowmap.rows, WIDTH, size),
        "attention": attention_cost(work.sequences, HEADS, KV_HEADS, HEAD_DIM, size),
    }


def table_of_primitives() -> Table:
    shown = Table(
        title=f"One site of width {WIDTH} in bfloat16: least bytes and operations, and a chip's time at best",
        title_justify="left",
    )
    for name in ("work", "primitive", "MB", "GFLOP", *(f"{name}, µs" for name in CHIPS), "bound by"):
        shown.add_column(name, justify="left" if name in ("work", "primitive", "bound by") else "right")
    for work in WORKS:
        for name, told in primitives(work).items():
            times = (f"{chip.seconds(told, torch.bfloat16) * 1e6:.2f}" for chip in CHIPS.values())
            bound = CHIPS["H200"].bound(told, torch.bfloat16)
            shown.add_row(work.name, name, f"{told.moved / 1e6:.3f}", f"{told.flops / 1e9:.4f}", *times, bound)
        shown.add_section()
    return shown


@dataclass(frozen=True)
class Limit:
    """Bytes that one decode step reads. `kept`: what deltas leave at most of the bare backbone's speed."""

    weights: int
    cached: int
    deltas: int

    @property
    def kept(self) -> float:
        bare = self.weights + self.cached
        return bare / (bare + self.deltas)


def limit(backbone: Backbone, deltas: list[Delta], requests: int, context: int) -> Limit:
    """Of one step that decodes a token for each of `requests`, with `context` tokens cached, `deltas` in turn.

    Each weight of a linear or norm is read once, a row of the embedding for each request, each delta that acts once,
    and a prefix once for each request that has it.
    """
    used = [deltas[number % len(deltas)] for number in range(requests)] if deltas else []
    once = {id(delta): delta for delta in used}.values()
    own = sum(delta.nbytes - _prefix_bytes(delta) for delta in once) + sum(_prefix_bytes(delta) for delta in used)
    shared = {key: base.numel() * base.element_size() for delta in once for key, base in delta.bases.items()}
    spec, size = backbone.spec, backbone.dtype.itemsize
    cached = sum(2 * spec.sites[name].kv_heads * spec.sites[name].head_dim for name in backbone.cached_sites)
    return Limit(weights_read(backbone), requests * context * cached * size, own + sum(shared.values()))


def weights_read(backbone: Backbone) -> int:
    """Bytes of weights that a decode step reads: all but embeddings, of which it reads a few rows."""
    looked_up = {site.name for site in backbone.spec.sites.values() if site.type is SiteType.EMBEDDING}
    tied = getattr(backbone.model.config, "tie_word_embeddings", False)
    modules = dict(backbone.model.named_modules())
    left_out = (
        0 if tied else sum(p.numel() for name in looked_up if name in modules for p in modules[name].parameters())
    )
    return int(backbone.nbytes - left_out * backbone.dtype.itemsize)


def _prefix_bytes(delta: Delta) -> int:
    pairs = ((p.keys, p.values) for ps in delta.at.values() for p in ps if hasattr(p, "keys") and hasattr(p, "values"))
    return sum(t.numel() * t.element_size() for pair in pairs for t in pair)


LARGE = ("llama-8b", "llama-1b")
COUNTS = (1, 8, 32, 128)
CONTEXT = 512


def table_of_limits() -> Table:
    shown = Table(
        title=f"What N deltas leave at most of the bare backbone's decoding, N requests, {CONTEXT} tokens cached",
        title_justify="left",
    )
    shown.add_column("backbone")
    shown.add_column("kind")
    shown.add_column("MB each", justify="right")
    for count in COUNTS:
        shown.add_column(f"N {count}", justify="right")
    for shape in LARGE:
        backbone = shapes.large(shape, torch.bfloat16, META)
        for kind in (*scale.KINDS, scale.MIXED):
            few = scale.several(kind, len(scale.KINDS), backbone.spec, META, torch.bfloat16)
            made = [replace(few[number % len(few)]) for number in range(max(COUNTS))]
            each = sum(delta.nbytes for delta in few) / len(few)
            kept = (f"{limit(backbone, made[:count], count, CONTEXT).kept:.3f}" for count in COUNTS)
            shown.add_row(shape, kind, f"{each / 1e6:.2f}", *kept)
        shown.add_section()
    return shown
