"""Packed attention: the reference, and the CPU's path over views of contiguous extents."""

from collections.abc import Callable
from dataclasses import dataclass

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


Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence, Attention], torch.Tensor]
"""One sequence's queries, keys and values -> its output."""


def one_by_one(run: Run, query: torch.Tensor, own: Pair, cache: Pair | None, attention: Attention) -> torch.Tensor:
    """`run` for each sequence, over its keys in the cache or of this forward. Returns [rows, heads, d]."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for sequence in attention.sequences.items:
        keys, values = cache if sequence.cached and cache is not None else own
        first, last = sequence.key_start, sequence.key_start + sequence.keys
        rows = slice(sequence.query_start, sequence.query_start + sequence.queries)
        out[rows] = run(query[rows], keys[first:last], values[first:last], sequence, attention)
    return out


def reference(
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


def cpu(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sequence: Sequence, attention: Attention
) -> torch.Tensor:
    """The reference's equation by torch's fused attention; keys and values stay views of the cache where they can."""
    if attention.softcap is not None:
        return reference(query, keys, values, sequence, attention)
    prefix_keys, prefix_values, bias = attention.parts(sequence)
    prefix = 0
    if prefix_keys is not None and prefix_values is not None:
        prefix = int(prefix_keys.shape[0])
        keys = torch.cat((prefix_keys.to(keys.dtype), keys))
        values = torch.cat((prefix_values.to(values.dtype), values))
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
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=plain,
        scale=attention.scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)
