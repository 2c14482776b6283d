"""Methods that change single numbers of a weight: SHiRA, supertuning. Each becomes one Sparse."""

import torch

from deltaserve.deltas.primitives import LowRank, Sparse
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each

SHIRA_OPTIONS = options.Options(used=TARGETED, inert=TRAINED | {"r", "mask_type", "random_seed"})
SUPERTUNING_OPTIONS = options.Options(
    used=TARGETED | {"r", "lora_alpha", "save_precomputed_indices", "bias"},
    inert=TRAINED | {"sparsity", "select_top", "lora_dropout"},
)


def shira(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """W[index] += values; the places are in the checkpoint. arXiv 2406.13175."""

    def one(target: Target, _: Weights) -> None:
        count = _count(target, "shira_weight")
        index = torch.stack(
            [part.int() for part in _places(target, "shira_indices", (2, count), (target.outputs, target.inputs))]
        )
        draft.put(target.name, Sparse(index, target.take("shira_weight", count)))

    each("shira", one)(checkpoint, draft, weights)


def supertuning(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """W.flatten()[index] += values, and a LoRA beside it where there is one."""

    def one(target: Target, _: Weights) -> None:
        if not target.has("supertuning_indices"):
            raise FailedPrecondition(
                f"{target.own!r} has no supertuning_indices: save the checkpoint with save_precomputed_indices",
                reason="OPTION_NOT_SERVED",
                metadata={"key": "save_precomputed_indices"},
            )
        count = _count(target, "supertuning_values")
        name, places = f"{target.name}.supertuning_indices", target.outputs * target.inputs
        flat = target.checkpoint.integers(name, (count,), places)
        index = torch.stack((flat // target.inputs, flat % target.inputs)).int()
        draft.put(target.name, Sparse(index, target.take("supertuning_values", count)))
        if target.has("supertuning_lora_A.weight"):
            rank = options.integer(checkpoint.config, "r", 8)
            scale = options.number(checkpoint.config, "lora_alpha", 8) / rank
            a = target.take("supertuning_lora_A.weight", rank, target.inputs)
            draft.put(target.name, LowRank(a, target.take("supertuning_lora_B.weight", target.outputs, rank), scale))

    each("supertuning", one)(checkpoint, draft, weights)


def _count(target: Target, part: str) -> int:
    """How many numbers a module changes: at most all of them."""
    found = target.shape(part)
    if len(found) != 1 or found[0] > target.outputs * target.inputs:
        raise BadCheckpoint(f"tensor {target.name}.{part} has shape {list(found)}; one dimension is expected")
    return found[0]


def _places(
    target: Target, part: str, shape: tuple[int, int], below: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    both = target.checkpoint.integers(f"{target.name}.{part}", shape, max(below))
    for axis, limit in enumerate(below):
        if both.numel() and int(both[axis].max()) >= limit:
            raise BadCheckpoint(f"tensor {target.name}.{part} names places outside of {list(below)}")
    return both[0], both[1]
