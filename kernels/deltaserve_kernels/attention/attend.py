"""Packed attention over the rows of many requests."""

from collections.abc import Callable, Mapping

import torch

from deltaserve_kernels.attention import paths
from deltaserve_kernels.attention.bias import RelativeBias
from deltaserve_kernels.attention.prefix import PrefixTable
from deltaserve_kernels.attention.sequences import Sequences
from deltaserve_kernels.dispatch import Implementation, path

Path = Callable[[torch.Tensor, paths.Pair, paths.Pair | None, paths.Attention], torch.Tensor]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    cache: tuple[torch.Tensor, torch.Tensor] | None,
    prefix: PrefixTable,
    scale: float,
    bias: RelativeBias | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(softcap(q kᵀ · scale) + bias) v for each sequence, over its slot's prefix and then its own keys.

    query [rows, heads, d]; key and value [key rows, kv_heads, d]; cache: keys and values [tokens, kv_heads, d] each,
    which get this forward's first, at `sequences.write`. Head h reads KV head h // (heads / kv_heads). Causal: the
    query of index i sees token keys j ≤ i, and with a window those j > i − window. Not causal: it sees all, and with a
    window those |i − j| < window. The n rows of a prefix stand before token 0, at j = −n to −1.
    Returns [rows, heads, d] in the query's dtype; rows of no sequence are zero.
    """
    if sequences.write is not None:
        assert cache is not None and sequences.write.shape[0] == key.shape[0]
        cache[0].index_copy_(0, sequences.write, key)
        cache[1].index_copy_(0, sequences.write, value)
    attention = paths.Attention(sequences, prefix, scale, bias, window, softcap)
    return path(_PATHS, query.device)(query, (key, value), cache, attention)


def triton(query: torch.Tensor, own: paths.Pair, cache: paths.Pair | None, attention: paths.Attention) -> torch.Tensor:
    from deltaserve_kernels.gpu import attention as gpu

    return gpu.launch(query, own, cache, attention)


_PATHS: Mapping[Implementation, Path] = {
    Implementation.REFERENCE: paths.reference,
    Implementation.CPU: paths.cpu,
    Implementation.TRITON: triton,
}
