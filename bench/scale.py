"""Deltas of the kinds that servers have most of, made where the backbone is: at the sizes of 1 B and 8 B that takes
seconds on a GPU, and on the meta device no memory at all.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.deltas import linears
from deltaserve.deltas.adapters import Bottleneck, Tap
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, LowRank, Prefix, SitePrimitive
from deltaserve.deltas.sites import BackboneSpec, Site, Task

PREFIX, BOTTLENECK = 32, 64
_RANDOM = Provenance(format="random", content_hash="", file_bytes=0, tensors_matched=0)
_SIZE = 0.02

At = Mapping[str, tuple[SitePrimitive, ...]]


@dataclass(frozen=True)
class Maker:
    """Random tensors of one dtype at one place."""

    spec: BackboneSpec
    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device) * _SIZE

    def ones(self, width: int) -> torch.Tensor:
        return 1 + self.normal(width)

    @property
    def linears(self) -> list[Site]:
        return linears(self.spec)

    def lora(self, rank: int, only: str = ".*") -> At:
        chosen = [site for site in self.linears if re.fullmatch(only, site.name.rpartition(".")[2])]
        return {
            site.name: (LowRank(self.normal(rank, site.in_features), self.normal(site.out_features, rank), 1.0),)
            for site in chosen
        }

    def prefix(self) -> At:
        sites = [self.spec.sites[name] for name in self.spec.prefix_sites]
        shape = {site.name: (PREFIX, site.kv_heads, site.head_dim) for site in sites}
        return {name: (Prefix(self.normal(*rows), self.normal(*rows)),) for name, rows in shape.items()}

    def biases(self) -> At:
        return {site.name: (Affine(shift=self.normal(site.out_features)),) for site in self.linears}

    def ia3(self) -> At:
        """Keys, values and the input of the last linear of the feed-forward, as in the paper."""
        found: dict[str, tuple[SitePrimitive, ...]] = {}
        for site in self.linears:
            ending = site.name.rpartition(".")[2]
            if ending in ("k_proj", "v_proj"):
                found[site.name] = (Affine(scale=self.ones(site.out_features)),)
            elif ending == "down_proj":
                found[site.name] = (Affine(in_scale=self.ones(site.in_features)),)
        return found

    def adapters(self) -> At:
        """One behind each feed-forward, as in arXiv 2005.00247."""
        ends = [site for site in self.linears if site.name.endswith("down_proj")]
        return {
            site.name: (
                Bottleneck(
                    self.normal(BOTTLENECK, site.out_features), self.normal(site.out_features, BOTTLENECK),
                    self.normal(BOTTLENECK), self.normal(site.out_features), "relu", input=Tap.OUTPUT, carry=Tap.OUTPUT,
                ),
            )
            for site in ends
        }  # fmt: skip


KINDS: Mapping[str, Callable[[Maker], At]] = {
    "LoRA r8": lambda maker: maker.lora(8),
    "LoRA r16": lambda maker: maker.lora(16),
    "LoRA r16 q, v": lambda maker: maker.lora(16, "q_proj|v_proj"),
    "LoRA r64": lambda maker: maker.lora(64),
    "adapter 64": Maker.adapters,
    "prefix 32": Maker.prefix,
    "BitFit": Maker.biases,
    "IA3": Maker.ia3,
}
MIXED = "mixed"
"""Every kind in turn."""


def delta(kind: str, spec: BackboneSpec, device: torch.device, dtype: torch.dtype) -> Delta:
    """Random numbers of torch's global generator. `kind` is one of KINDS."""
    shift = PREFIX if kind.startswith("prefix") and spec.prefix_positions else 0
    at = KINDS[kind](Maker(spec, device, dtype))
    return Delta(kinds=(kind,), at=at, task=Task.GENERATION, provenance=_RANDOM, position_shift=shift)


def several(kind: str, count: int, spec: BackboneSpec, device: torch.device, dtype: torch.dtype) -> list[Delta]:
    """As many of one kind, or of each in turn."""
    kinds: Sequence[str] = list(KINDS) if kind == MIXED else [kind]
    return [delta(kinds[number % len(kinds)], spec, device, dtype) for number in range(count)]
