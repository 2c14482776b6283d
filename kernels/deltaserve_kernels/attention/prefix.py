"""PrefixTable: for one attention site, the keys and values that a slot's rows see before all others."""

import torch

from deltaserve_kernels.slots import SlotTable


class PrefixTable(SlotTable):
    """Columns keys and values [n, kv_heads, head_dim]; scalars pre, tok, biased (see `RelativeBias.of`)."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(2, capacity, device)
