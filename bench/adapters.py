"""Adapters at the sizes they have in life, made of random numbers: each kind as its library's default lowers."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from deltaserve.deltas.adapters import Adapter, Bottleneck, Fusion, Tap
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.sites import BackboneSpec, Part, Sublayer, Task
from deltaserve_kernels.fusion import folded

_RANDOM = Provenance(format="random", content_hash="", file_bytes=0, tensors_matched=0)
MEMBERS = 3
"""Adapters that a fusion attends over."""


def houlsby(spec: BackboneSpec, seed: int) -> Delta:
    """Behind attention and feed-forward, a sixteenth as wide: arXiv 1902.00751."""
    return _everywhere("houlsby", spec, seed, 16, "silu")


def compacter(spec: BackboneSpec, seed: int) -> Delta:
    """At the same places, half as wide; its Kronecker products are made at load: arXiv 2106.04647."""
    return _everywhere("compacter", spec, seed, 32, "gelu")


def pfeiffer(spec: BackboneSpec, seed: int) -> Delta:
    """Behind feed-forward, of the stream there: arXiv 2005.00247."""
    return _fed_forward("pfeiffer", spec, seed, lambda sub, make: make(input=_stream(sub), activation="relu"))


def parallel(spec: BackboneSpec, seed: int) -> Delta:
    """Beside feed-forward, of the stream before it: arXiv 2110.04366."""
    return _fed_forward("parallel", spec, seed, lambda _, make: make(input=Tap.RESIDUAL, activation="relu", scale=4.0))


def fusion(spec: BackboneSpec, seed: int) -> Delta:
    """Over Pfeiffer's adapters, the key in the query: arXiv 2005.00247. Small ones: no member takes all of a row."""
    wide = spec.hidden_size
    random = torch.Generator().manual_seed(seed + 1)

    def square() -> torch.Tensor:
        return torch.randn(wide, wide, generator=random).mul_(0.01)

    def fused(sub: Sublayer, make: Callable[..., Bottleneck]) -> Fusion:
        members = tuple(make(input=_stream(sub), activation="relu") for _ in range(MEMBERS))
        query, bias = folded(square(), torch.randn(wide, generator=random) * 0.01, square())
        return Fusion(members, query, bias, value=square() + torch.eye(wide), query_tap=_stream(sub))

    return _fed_forward("fusion", spec, seed, fused)


MAKE: Mapping[str, Callable[[BackboneSpec, int], Delta]] = {
    "houlsby": houlsby, "pfeiffer": pfeiffer, "parallel": parallel, "compacter": compacter, "fusion": fusion,
}  # fmt: skip


def _stream(sub: Sublayer) -> Tap:
    """The residual stream behind a sublayer."""
    return Tap.NORMED if sub.post else Tap.SUM


def _everywhere(name: str, spec: BackboneSpec, seed: int, reduction: int, activation: str) -> Delta:
    make = _maker(spec, seed, reduction)
    return _delta(name, {sub.last: make(activation=activation) for sub in spec.sublayers})


def _fed_forward(
    name: str, spec: BackboneSpec, seed: int, one: Callable[[Sublayer, Callable[..., Bottleneck]], Adapter]
) -> Delta:
    make = _maker(spec, seed, 16)
    return _delta(name, {sub.last: one(sub, make) for sub in spec.sublayers if sub.part is Part.FEED_FORWARD})


def _maker(spec: BackboneSpec, seed: int, reduction: int) -> Callable[..., Bottleneck]:
    return partial(_bottleneck, spec.hidden_size, reduction, torch.Generator().manual_seed(seed))


def _bottleneck(wide: int, reduction: int, random: torch.Generator, **known: object) -> Bottleneck:
    narrow = max(1, wide // reduction)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.02

    return Bottleneck(normal(narrow, wide), normal(wide, narrow), normal(narrow), normal(wide), **known)  # type: ignore[arg-type]


def _delta(name: str, at: Mapping[str, Adapter]) -> Delta:
    return Delta((name,), {site: (adapter,) for site, adapter in at.items()}, Task.GENERATION, _RANDOM)
