"""The attention function that transformers' own modelling code calls in a packed forward.

`AttentionInterface` is process-global, so the function holds no state: it finds its backbone's `Now` through the
attention module that calls it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from deltaserve.deltas.sites import Axis
from deltaserve.plan import Now
from deltaserve_kernels.attention import PrefixTable, RelativeBias, attend

NAME = "deltaserve"
_ATTRIBUTE = "_deltaserve_attention"


@dataclass(eq=False)
class AttentionSite:
    """One attention module: its place in the plan, its cache, its prefixes. `bias` for T5's self-attentions."""

    name: str
    axis: Axis
    now: Now
    prefix: PrefixTable
    bias: RelativeBias | None = None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, rows, d], key and value [1, kv_heads, key rows, d] -> ([1, rows, heads, d], None)."""
    site: AttentionSite = getattr(module, _ATTRIBUTE)
    plan = site.now.plan
    assert plan is not None and attention_mask is None, "packed attention outside a packed forward"
    sequences = plan.attention[site.axis]
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if site.axis is Axis.MEMORY:
        # In steps that admit nobody the decoder gets one dummy memory row, which nobody may read.
        rows = plan.maps[Axis.MEMORY].rows
        keys, values = keys[:rows], values[:rows]
    out = attend(
        query[0].transpose(0, 1),
        keys,
        values,
        sequences,
        cache=site.now.cache.get(site.name),
        prefix=site.prefix,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        bias=site.bias,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


def attach(module: torch.nn.Module, site: AttentionSite) -> None:
    """Makes `packed_attention` find `site` when `module` calls it."""
    object.__setattr__(module, _ATTRIBUTE, site)


def register() -> None:
    """Names `packed_attention` to transformers. Safe to call more than once."""
    AttentionInterface.register(NAME, packed_attention)
