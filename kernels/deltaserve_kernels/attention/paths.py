"""Packed attention: the reference, and the CPU's path over views of contiguous extents."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from deltaserve_kernels.attention.bias import RelativeBias
from deltaserve_kernels.attention.prefix import PrefixTable
from deltaserve_kernels.attention.sequences import Sequence, Sequences

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [tokens, kv_heads, d]."""


@dataclass(frozen=True, eq=False)
class Attention:
    """What does not differ between the sequences of one call."""

    sequences: Sequences
    prefix: PrefixTable
    scale: float
    bias: RelativeBias | None
    window: int | None
    softcap: float | None

    def parts(self, sequence: Sequence) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """A sequence's prefix keys, prefix values and fp32 bias [heads, queries, prefix + keys]."""
        entry = self.prefix.get(sequence.slot) if sequence.slot >= 0 else None
        if entry is None:
            bias = None if self.bias is None else self.bias.of(sequence, self.sequences, 0, 0, 0)
            return None, None, bias
        keys, values = entry.tensors
        assert keys is not None
        pre, tok, biased = entry.scalars
        bias = None
        if self.bias is not None and biased:
            bias = self.bias.of(sequence, self.sequences, int(keys.shape[0]), int(pre), int(tok))
        return keys, values, bias

    def hidden(self, sequence: Sequence, prefix: int, device: torch.device) -> torch.Tensor | None:
        """bool [queries, prefix + keys]: True where a query may not look; None where it may look everywhere."""
        whole = sequence.queries == 1 and sequence.keys == sequence.position + 1
        furthest = prefix + max(sequence.position + sequence.queries, sequence.keys) - 1
        if (not self.sequences.causal or whole) and (self.window is None or furthest < self.window):
            return None
        index = torch.arange(sequence.position, sequence.position + sequence.queries, device=device).unsqueeze(1)
        keys = torch.arange(sequence.keys, device=device)
        mask = keys > index if self.sequences.causal else torch.zeros_like(keys > index)
        if self.window is not None:
            mask = mask | (keys <= index - self.window)
            if not self.sequences.causal:
                mask = mask | (keys >= index + self.window)
        before = mask.new_zeros(sequence.queries, prefix)
        if self.window is not None:
            # The prefix stands before the first token, at positions of its own.
            before = torch.arange(prefix, device=device) <= index + prefix - self.window
        return torch.cat((before, mask), 1)


def reference(query: torch.Tensor, own: Pair, cache: Pair | None, attention: Attention) -> torch.Tensor:
    """`_one` for each sequence, over its keys in the cache or of this forward. Returns [rows, heads, d]."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for sequence in attention.sequences.items:
        keys, values = cache if sequence.cached and cache is not None else own
        first, last = sequence.key_start, sequence.key_start + sequence.keys
        rows = slice(sequence.query_start, sequence.query_start + sequence.queries)
        out[rows] = _one(query[rows], keys[first:last], values[first:last], sequence, attention)
    return out


def _one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequence: Sequence, attention: Attention
) -> torch.Tensor:
    """softmax(softcap(q kᵀ · scale) + bias, hidden) v in fp32. query [queries, heads, d] -> the same shape."""
    prefix_keys, prefix_values, bias = attention.parts(sequence)
    prefix = 0
    if prefix_keys is not None and prefix_values is not None:
        prefix = int(prefix_keys.shape[0])
        keys = torch.cat((prefix_keys.to(keys.dtype), keys))
        values = torch.cat((prefix_values.to(values.dtype), values))
    groups = query.shape[1] // keys.shape[1]
    k = keys.float().repeat_interleave(groups, 1)
    v = values.float().repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), k) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if bias is not None:
        scores = scores + bias
    hidden = attention.hidden(sequence, prefix, query.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)


def cpu(query: torch.Tensor, own: Pair, cache: Pair | None, attention: Attention) -> torch.Tensor:
    """The reference's equation by torch's fused attention, over views of the keys; sequences alike in one call.

    query [rows, heads, d] -> the same shape.
    """
    if attention.softcap is not None:
        return reference(query, own, cache, attention)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for batch in _batches(attention):
        first = batch.first
        keys, values = cache if first.cached and cache is not None else own
        rows = slice(first.query_start, first.query_start + batch.count * first.queries)
        shape = (batch.count, first.queries, *query.shape[1:])
        done = _fused(query[rows].view(shape), batch.of(keys), batch.of(values), first, attention)
        out[rows].view(shape).copy_(done)
    return out


@dataclass(frozen=True)
class Batch:
    """`count` sequences like `first`, without a prefix if there are several, whose keys begin `step` rows apart."""

    first: Sequence
    count: int
    step: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, heads, d] -> a view [count, keys, heads, d]."""
        shape = (self.count, self.first.keys, *x.shape[1:])
        offset = x.storage_offset() + self.first.key_start * x.stride(0)
        return x.as_strided(shape, (self.step * x.stride(0), *x.stride()), offset)


def _batches(attention: Attention) -> tuple[Batch, ...]:
    """Neighbours that differ in nothing but their place, and stand evenly; once for all layers of a forward."""
    sequences = attention.sequences
    prefixed = frozenset([slot for slot in sequences.slots if slot in attention.prefix])
    found = sequences.kept.get(("batches", prefixed))
    if found is None:
        found = sequences.kept["batches", prefixed] = tuple(_even(sequences.items, prefixed))
    return found  # type: ignore[return-value]


def _even(items: tuple[Sequence, ...], prefixed: frozenset[int]) -> Iterator[Batch]:
    at = 0
    while at < len(items):
        first, count, step = items[at], 1, 0
        for last, each in pairwise(items[at:]):
            begins = each.query_start == last.query_start + last.queries
            alike = replace(each, query_start=0, key_start=0, slot=0) == replace(
                first, query_start=0, key_start=0, slot=0
            )
            between = each.key_start - last.key_start
            if not (begins and alike and {first.slot, each.slot}.isdisjoint(prefixed)) or between < 0:
                break
            if count > 1 and between != step:
                break
            count, step = count + 1, between
        yield Batch(first, count, step)
        at += count


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequence: Sequence, attention: Attention
) -> torch.Tensor:
    """query [batch, queries, heads, d], keys and values [batch, keys, kv_heads, d] -> as the query."""
    prefix_keys, prefix_values, bias = attention.parts(sequence)
    prefix = 0
    if prefix_keys is not None and prefix_values is not None:
        prefix = int(prefix_keys.shape[0])
        keys = torch.cat((prefix_keys.to(keys.dtype).unsqueeze(0), keys), 1)
        values = torch.cat((prefix_values.to(values.dtype).unsqueeze(0), values), 1)
    causal = attention.sequences.causal and sequence.position == 0 and sequence.keys == sequence.queries
    plain = causal and sequence.queries > 1 and not prefix and bias is None and attention.window is None
    mask = None
    if not plain:
        hidden = attention.hidden(sequence, prefix, query.device)
        if bias is not None:
            mask = (bias if hidden is None else bias.masked_fill(hidden, float("-inf"))).to(query.dtype).unsqueeze(0)
        elif hidden is not None:
            mask = ~hidden
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain,
        scale=attention.scale,
        enable_gqa=query.shape[2] != keys.shape[2],
    )
    return out.transpose(1, 2)
