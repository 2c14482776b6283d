"""Random deltas for random backbones, and PEFT's model that holds the same ones."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaserve.deltas.delta import Delta, Provenance, mapped
from deltaserve.deltas.primitives import (
    Affine,
    Block,
    Dense,
    Head,
    HeadLayer,
    LowRank,
    Prefix,
    Rows,
    SitePrimitive,
    SoftPrompt,
    Sparse,
)
from deltaserve.deltas.sites import BackboneSpec, Pooling, Site, SiteType, Task

_RANDOM = Provenance(format="random", content_hash="", file_bytes=0, tensors_matched=0)
_LINEARS = (SiteType.LINEAR, SiteType.CONV1D)
_OUTSIDE = re.compile(r"lm_head|.*\.pooler\..*")


def linears(spec: BackboneSpec) -> list[Site]:
    """The linears of the layers: not the vocabulary's, not the pooler's."""
    return [site for site in spec.sites.values() if site.type in _LINEARS and not _OUTSIDE.fullmatch(site.name)]


def lora(spec: BackboneSpec, rank: int, seed: int, size: float = 0.02) -> Delta:
    """LoRA at all linears of all layers, fp32 as PEFT saves it."""
    random = torch.Generator().manual_seed(seed)
    at = {site.name: (_low_rank(site, rank, random, size),) for site in linears(spec)}
    return _delta("lora", at)


def of_all_kinds(spec: BackboneSpec, seed: int) -> list[Delta]:
    """One delta of each kind that acts in this family; each of them moves the output by much."""
    random = torch.Generator().manual_seed(seed)
    sites = linears(spec)

    def normal(*shape: int, size: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * size

    scales = {s.name: (Affine(normal(s.in_features) + 1, normal(s.out_features) + 1),) for s in sites[::3]}
    shifts = {s.name: (Affine(shift=normal(s.out_features)),) for s in sites[1::2]}
    whole = {s.name: (Dense(normal(s.out_features, s.in_features, size=0.1)),) for s in sites[-2:]}
    turns = {s.name: (Block(normal(s.in_features // 4, 4, 4, size=0.5)),) for s in sites[::2] if s.in_features % 4 == 0}
    few = {s.name: (_sparse(s, random),) for s in sites}
    norms = {
        s.name: (
            Affine(
                scale=normal(s.out_features) + 1, shift=None if s.bias is None else normal(s.out_features), replace=True
            ),
        )
        for s in spec.sites.values()
        if s.type is SiteType.NORM
    }
    tokens = {
        s.name: (Rows(torch.arange(3, 60, 2, dtype=torch.int32), normal(29, s.out_features, size=1.0)),)
        for s in spec.sites.values()
        if s.type is SiteType.EMBEDDING and s.in_features == spec.vocab_size
    }
    attentions = [spec.sites[name] for name in spec.prefix_sites]
    prefix = {
        s.name: (Prefix(normal(5, s.kv_heads, s.head_dim), normal(5, s.kv_heads, s.head_dim), pre=5 * spec.prefix_pre),)
        for s in attentions
    }
    found = [
        lora(spec, 8, seed, 0.2),
        lora(spec, 3, seed + 1, 0.2),
        _delta("ia3", scales),
        _delta("bias", shifts),
        _delta("dense", whole),
        _delta("block", turns),
        _delta("sparse", few),
        _delta("norm", norms),
        _delta("tokens", tokens),
        _delta("prefix-tuning", prefix, position_shift=5 if spec.prefix_positions else 0),
        _delta("prompt-tuning", {}, prompt=SoftPrompt(normal(4, spec.hidden_size))),
    ]
    if Task.SEQUENCE_CLASSIFICATION in spec.heads:
        layers = (HeadLayer(normal(3, spec.hidden_size), normal(3)),)
        pooling = spec.heads[Task.SEQUENCE_CLASSIFICATION].pooling
        found.append(_headed(lora(spec, 4, seed + 2, 0.2), Head(layers), pooling))
    return found


def on(delta: Delta, device: torch.device) -> Delta:
    """The same delta with its tensors on `device`."""
    return mapped(delta, lambda tensor: tensor.to(device))


def in_peft(model: PreTrainedModel, prefix: str, deltas: Sequence[Delta]) -> Any:
    """Puts PEFT's tuners on `model` (in place), one adapter d0, d1, … for each LoRA; `prefix` is that of our names."""
    import peft

    targets = [name.removeprefix(prefix) for name in deltas[0].at]
    rank = int(_pair(deltas[0], next(iter(deltas[0].at))).a.shape[0])
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what PEFT asks transformers
        held = peft.get_peft_model(model, config, adapter_name="d0")
        for number in range(1, len(deltas)):
            held.add_adapter(f"d{number}", config)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for number, delta in enumerate(deltas):
            for name in delta.at:
                pair, tuner = _pair(delta, name), modules[name.removeprefix(prefix)]
                assert pair.scale == 1.0, "alpha equals the rank"
                tuner.lora_A[f"d{number}"].weight.copy_(pair.a)
                tuner.lora_B[f"d{number}"].weight.copy_(pair.b)
    return held.eval()


def _pair(delta: Delta, name: str) -> LowRank:
    (primitive,) = delta.at[name]
    assert isinstance(primitive, LowRank)
    return primitive


def _low_rank(site: Site, rank: int, random: torch.Generator, size: float) -> LowRank:
    a = torch.randn(rank, site.in_features, generator=random) * size
    return LowRank(a, torch.randn(site.out_features, rank, generator=random) * size, 1.0)


def _sparse(site: Site, random: torch.Generator) -> Sparse:
    """A sixteenth of the places."""
    total = site.in_features * site.out_features
    flat = torch.randperm(total, generator=random)[: max(1, total // 16)].sort().values
    index = torch.stack((flat // site.in_features, flat % site.in_features)).to(torch.int32)
    return Sparse(index.contiguous(), torch.randn(flat.shape[0], generator=random) * 0.3)


def _delta(kind: str, at: dict[str, tuple[SitePrimitive, ...]] | dict[str, Any], **more: Any) -> Delta:
    return Delta(kinds=(kind,), at=at, task=Task.GENERATION, provenance=_RANDOM, **more)


def _headed(delta: Delta, head: Head, pooling: Pooling) -> Delta:
    return Delta(
        kinds=(*delta.kinds, "head"),
        at=delta.at,
        task=Task.SEQUENCE_CLASSIFICATION,
        provenance=_RANDOM,
        head=head,
        pooling=pooling,
        labels=tuple(f"LABEL_{i}" for i in range(head.width)),
    )
