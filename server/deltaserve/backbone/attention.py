"""The attention function that transformers' own modelling code calls in a packed forward.

`AttentionInterface` is process-global, so the function holds no state: it finds its backbone's `Now` through the
attention module that calls it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface

from deltaserve.backbone.gates import GateTable, means
from deltaserve.backbone.wrap import WrappedModule
from deltaserve.deltas.primitives import Prefix
from deltaserve.deltas.sites import Axis
from deltaserve.plan import Now
from deltaserve_kernels.attention import PrefixTable, RelativeBias, attend
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.rowmap import BARE, RowMap

NAME = "deltaserve"
_ATTRIBUTE = "_deltaserve_attention"


@dataclass(eq=False)
class AttentionSite:
    """One attention module: its place in the plan, its cache, its prefixes. `bias` for T5's self-attentions.

    `gates` of prefixes read what the module gets, which is what its first linear, `first`, gets and keeps for them.
    """

    name: str
    axis: Axis
    now: Now
    prefix: PrefixTable
    gates: GateTable
    bias: RelativeBias | None = None
    first: WrappedModule | None = None

    def install(self, slot: int, prefix: Prefix) -> None:
        """Publishes a slot's prefix, whose tensors are on the device."""
        scalars = (float(prefix.pre), float(prefix.tok), float(prefix.biased))
        self.prefix.put(slot, (prefix.keys, prefix.values), scalars)
        if prefix.gate is not None:
            assert self.first is not None, f"no sublayer begins at {self.name}, whose prefix has a gate"
            self.gates.put(slot, (prefix.gate.weight, prefix.gate.bias))
            self.first.keep(slot)

    def remove(self, slot: int) -> None:
        self.prefix.discard(slot)
        if slot in self.gates:
            self.gates.drop(slot)
            assert self.first is not None
            self.first.forget(slot)


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
    prefix = site.prefix
    if site.gates.touches(plan.maps[site.axis]):
        sequences, prefix = _gated(site, sequences, plan.maps[site.axis])
    out = attend(
        query[0].transpose(0, 1),
        keys,
        values,
        sequences,
        cache=site.now.cache.get(site.name),
        prefix=prefix,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        bias=site.bias,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


def _gated(site: AttentionSite, sequences: Sequences, rowmap: RowMap) -> tuple[Sequences, PrefixTable]:
    """The same sequences, those with a gate under numbers of their own behind all slots, and their prefixes."""
    assert site.first is not None
    found = means(site.now.kept[site.first.site.name], rowmap, site.gates, sequences)
    capacity = site.prefix.capacity
    table = PrefixTable(capacity + len(sequences.items), site.prefix.device)
    items = []
    for number, sequence in enumerate(sequences.items):
        entry = None if sequence.slot == BARE else site.prefix.get(sequence.slot)
        if entry is not None and sequence.slot in site.gates:
            keys, values = entry.tensors
            assert keys is not None and values is not None
            scaled = (keys.float() * found[number, 0], values.float() * found[number, 1])
            sequence = replace(sequence, slot=capacity + number)
            table.put(sequence.slot, scaled, entry.scalars)
        elif entry is not None and sequence.slot not in table:
            table.put(sequence.slot, entry.tensors, entry.scalars)
        items.append(sequence)
    return Sequences(tuple(items), sequences.causal, sequences.write), table


def attach(module: torch.nn.Module, site: AttentionSite) -> None:
    """Makes `packed_attention` find `site` when `module` calls it."""
    object.__setattr__(module, _ATTRIBUTE, site)


def register() -> None:
    """Names `packed_attention` to transformers. Safe to call more than once."""
    AttentionInterface.register(NAME, packed_attention)
