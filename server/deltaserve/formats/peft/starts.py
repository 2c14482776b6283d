"""Ways in which LoRA starts that take something out of the backbone's weight: PEFT repeats them at load."""

from collections.abc import Callable, Mapping

import torch

from deltaserve.errors import FailedPrecondition
from deltaserve.formats.peft import options

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, in] and B [out, r], fp32."""
Taken = Callable[[torch.Tensor, int, float], Pair]
"""Of a weight [out, in], a rank and LoRA's scale: what is subtracted from the weight, as B A."""

_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the backbone as it is."""


def taken(start: object) -> Taken | None:
    """What this init_lora_weights takes out of a weight. Raises FailedPrecondition where the checkpoint cannot tell."""
    found = _STARTS.get(start) if isinstance(start, str) else None
    if found is None and start not in _PLAIN:
        raise FailedPrecondition(
            f"config key 'init_lora_weights' is {str(start)[:80]!r}, which changes the backbone's weights in a way "
            "that the checkpoint does not tell: convert it to plain LoRA (path_initial_model_for_weight_conversion of "
            "PEFT's save_pretrained)",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "init_lora_weights"},
        )
    return found


def principal(weight: torch.Tensor, rank: int, scale: float) -> Pair:
    """PiSSA (arXiv 2404.02948): the `rank` largest singular values."""
    del scale
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def tail(weight: torch.Tensor, rank: int, scale: float) -> Pair:
    """KaSA (arXiv 2412.06071): the `rank` smallest singular values."""
    del scale
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[-rank:], u[:, -rank:] * s[-rank:]


def orthonormal(weight: torch.Tensor, rank: int, scale: float) -> Pair:
    """OLoRA (arXiv 2406.01775): s Q R of the first `rank` columns of Q, W = Q R."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], scale * q[:, :rank]


_STARTS: Mapping[str, Taken] = {"pissa": principal, "olora": orthonormal}


class Blocks:
    """BD-LoRA (`use_bdlora`): which modules have A or B of diagonal blocks, stored below one another."""

    def __init__(self, told: object) -> None:
        found = told if isinstance(told, dict) else {}
        self._a, self._b = (options.listed(found, f"target_modules_bd_{side}") for side in "ab")
        self._strict = options.flag(found, "match_strict", True)
        self.count = options.integer(found, "nblocks", 1)
        self.any = bool(told)

    def at(self, own: str) -> tuple[int, int]:
        """Blocks of A and of B at a module: PEFT asks whether an entry is anywhere in its name."""
        a, b = (any(entry in own for entry in entries) for entries in (self._a, self._b))
        if a and b:
            raise options.wrong("use_bdlora", f"means both A and B of {own!r}; PEFT allows one of them")
        if self.any and self._strict and not (a or b):
            raise options.wrong("use_bdlora", f"means neither A nor B of {own!r}, and match_strict is true")
        return self.count if a else 1, self.count if b else 1


def spread(stacked: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, columns · count] with blocks on the diagonal, of [rows, columns], `count` blocks one below the other."""
    return stacked if count == 1 else torch.block_diag(*stacked.chunk(count))
