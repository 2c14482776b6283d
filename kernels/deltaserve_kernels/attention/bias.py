"""T5's relative position bias (arXiv 1910.10683), from its table instead of a dense [heads, queries, keys]."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from deltaserve_kernels.attention.sequences import Sequence, Sequences


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """bias[h, i, j] = table[bucket(j − i), h]; table [buckets, heads]."""

    table: torch.Tensor
    bidirectional: bool
    max_distance: int

    def of(self, sequence: Sequence, sequences: Sequences, prefix: int, pre: int, tok: int) -> torch.Tensor:
        """fp32 [heads, queries, prefix + keys] for one sequence, the prefix's keys first.

        Relative position of prefix row p for the query of index i is p − i + pre, of token j is j − i + tok.
        """
        key = (sequence.queries, sequence.position, sequence.keys, prefix, pre, tok)
        buckets = sequences.buckets.get(key)
        if buckets is None:
            device = self.table.device
            index = torch.arange(sequence.position, sequence.position + sequence.queries, device=device)
            places = torch.cat(
                (torch.arange(prefix, device=device) + pre, torch.arange(sequence.keys, device=device) + tok)
            )
            buckets = bucket(places - index.unsqueeze(1), self.bidirectional, self.table.shape[0], self.max_distance)
            sequences.buckets[key] = buckets
        return self.table.float()[buckets].permute(2, 0, 1)

    @property
    def furthest(self) -> int:
        """From this distance on nothing changes."""
        return max(self.max_distance, int(self.table.shape[0]))

    @cached_property
    def curve(self) -> torch.Tensor:
        """fp32 [heads, 2 · furthest + 1], contiguous: the bias at each distance from −furthest to furthest.

        A kernel reads it in place of buckets, whose logarithm another device would round to another bucket.
        """
        distances = torch.arange(-self.furthest, self.furthest + 1)
        buckets = bucket(distances, self.bidirectional, self.table.shape[0], self.max_distance)
        # Where half of the buckets reach as far as max_distance, those beyond it have none, here and in transformers.
        return self.table.float()[buckets.clamp_min(0).to(self.table.device)].T.contiguous()


def bucket(distance: torch.Tensor, bidirectional: bool, buckets: int, max_distance: int) -> torch.Tensor:
    """The bucket of a relative position (key minus query), int64; half are exact, half logarithmic."""
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = buckets // 2
    ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp_max(buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
