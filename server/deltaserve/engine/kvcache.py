"""Keys and values of running sequences: one contiguous extent each, reserved for its whole life when it is admitted."""

from collections.abc import Mapping

import psutil
import torch

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Axis
from deltaserve.plan import KeysValues
from deltaserve.pool.extents import Extents

_BLOCK = 16
_CPU_BYTES = 4 << 30
_CPU_SHARE = 0.25
_CUDA_SHARE = 0.8


class KVCache:
    """`self_tokens` and `memory_tokens` hand out extents; `arrays` are [tokens, kv_heads, head_dim] by attention site.

    Self-attention and cross-attention get the same number of tokens; both are 0 where a backbone caches nothing.
    """

    def __init__(self, backbone: Backbone, budget: int | None) -> None:
        sites = {name: (axis, backbone.spec.sites[name]) for name, axis in backbone.cached_sites.items()}
        size: int = backbone.dtype.itemsize
        per_token = sum(2 * site.kv_heads * site.head_dim * size for _, site in sites.values())
        budget = default_budget(backbone.device) if budget is None else budget
        tokens = budget // per_token if per_token else 0
        crossed = any(axis is Axis.MEMORY for axis, _ in sites.values())
        self.self_tokens = Extents(tokens, _BLOCK)
        self.memory_tokens = Extents(tokens if crossed else 0, _BLOCK)
        self.bytes_per_token = per_token
        shape_of = {name: (tokens, site.kv_heads, site.head_dim) for name, (_, site) in sites.items()}
        self.arrays: Mapping[str, KeysValues] = {
            name: (
                torch.empty(shape, dtype=backbone.dtype, device=backbone.device),
                torch.empty(shape, dtype=backbone.dtype, device=backbone.device),
            )
            for name, shape in shape_of.items()
        }

    @property
    def capacity_bytes(self) -> int:
        return self.self_tokens.capacity * self.bytes_per_token

    @property
    def used_tokens(self) -> int:
        """The larger of the two uses; what limits admission."""
        return max(self.self_tokens.used, self.memory_tokens.used)

    @property
    def used_bytes(self) -> int:
        return self.used_tokens * self.bytes_per_token


def default_budget(device: torch.device) -> int:
    """CPU: a quarter of free memory, 4 GiB at most. CUDA: four fifths of what the backbone left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_SHARE)
    available: int = psutil.virtual_memory().available
    return min(_CPU_BYTES, int(available * _CPU_SHARE))
