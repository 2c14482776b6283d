"""What a GPU could do at best: time by bytes and operations of what runs, and what deltas may keep of its speed.

Nothing here is measured: figures of chips are their makers', bytes and operations are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from bench import scale, shapes
from bench.primitives import FULL, WORKS, primitives
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import SiteType
from deltaserve_kernels.cost import Cost

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


def table_of_primitives() -> Table:
    shown = Table(
        title=f"One site of width {FULL.width} in bfloat16: least bytes and operations, and a chip's time at best",
        title_justify="left",
    )
    for name in ("work", "primitive", "MB", "GFLOP", *(f"{name}, µs" for name in CHIPS), "bound by"):
        shown.add_column(name, justify="left" if name in ("work", "primitive", "bound by") else "right")
    for work in WORKS:
        for one in primitives(work, FULL, META, torch.bfloat16):
            told = one.cost
            times = (f"{chip.seconds(told, torch.bfloat16) * 1e6:.2f}" for chip in CHIPS.values())
            bound = CHIPS["H200"].bound(told, torch.bfloat16)
            shown.add_row(work.name, one.name, f"{told.moved / 1e6:.3f}", f"{told.flops / 1e9:.4f}", *times, bound)
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
    sizes = {id(delta.at): (delta.nbytes, _prefix_bytes(delta)) for delta in {id(d.at): d for d in used}.values()}
    own = sum(sizes[id(delta.at)][0] - sizes[id(delta.at)][1] for delta in once)
    own += sum(sizes[id(delta.at)][1] for delta in used)
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
            each_kind = len(scale.KINDS) if kind == scale.MIXED else 1
            few = scale.several(kind, each_kind, backbone.spec, META, torch.bfloat16)
            made = [replace(few[number % len(few)]) for number in range(max(COUNTS))]
            each = sum(delta.nbytes for delta in few) / len(few)
            kept = (f"{limit(backbone, made[:count], count, CONTEXT).kept:.3f}" for count in COUNTS)
            shown.add_row(shape, kind, f"{each / 1e6:.2f}", *kept)
        shown.add_section()
    return shown
