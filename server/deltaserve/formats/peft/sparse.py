"""Methods that change single numbers of a weight: SHiRA, supertuning. Each becomes one Sparse."""

import torch

from deltaserve.deltas.primitives import LowRank, Sparse
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each

SHIRA_OPTIONS = options.Options(used=TARGETED, inert=TRAINED | {"r", "mask_type", "random_seed"})
SUPERTUNING_OPTIONS = options.Options(
    used=TARGETED | {"r", "lora_alpha", "save_precomputed_indices", "sparsity", "select_top"},
    inert=TRAINED | {"lora_dropout"},
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
    """W.flatten()[index] += values, and a LoRA beside it where there is one. arXiv 2607.09287.

    A checkpoint without the places has the numbers in the order of PEFT's: W's largest first, or its smallest.
    """
    config = checkpoint.config
    saved = options.flag(config, "save_precomputed_indices", True)
    sparsity = options.number(config, "sparsity", 0.99)
    largest = options.flag(config, "select_top", True)
    if not 0 <= sparsity < 1:
        raise options.wrong("sparsity", f"is {sparsity}; a number from 0, and below 1, is expected")

    def one(target: Target, weights: Weights) -> None:
        count = _count(target, "supertuning_values")
        name, places = f"{target.name}.supertuning_indices", target.outputs * target.inputs
        if saved or target.has("supertuning_indices"):
            flat = target.checkpoint.integers(name, (count,), places)
        elif count != int(places * (1 - sparsity)) or not count:
            expected = int(places * (1 - sparsity))
            raise BadCheckpoint(
                f"tensor {target.name}.supertuning_values has {count} numbers; sparsity says {expected}"
            )
        else:
            flat = _ranked(target, weights(target.name), count, largest)
        index = torch.stack((flat // target.inputs, flat % target.inputs)).int()
        draft.put(target.name, Sparse(index, target.take("supertuning_values", count)))
        if target.has("supertuning_lora_A.weight"):
            rank = options.integer(checkpoint.config, "r", 8)
            scale = options.number(checkpoint.config, "lora_alpha", 8) / rank
            a = target.take("supertuning_lora_A.weight", rank, target.inputs)
            draft.put(target.name, LowRank(a, target.take("supertuning_lora_B.weight", target.outputs, rank), scale))

    each("supertuning", one)(checkpoint, draft, weights)


_MOST_EQUAL = 0.1
"""Of the places: how many may be in an order that the weights do not tell. Of float32 weights a few in a hundred are
equal to another by chance, of 16 bits nearly all."""


def _ranked(target: Target, weight: torch.Tensor, count: int, largest: bool) -> torch.Tensor:
    """The places of the `count` largest (or smallest) |W|, in order, as PEFT finds them on a CPU.

    Among equal numbers the order is that of the device. Raises FailedPrecondition where many are equal.
    """
    scores = weight.abs().flatten()
    found, flat = scores.topk(count, largest=largest)
    same, last = found[1:] == found[:-1], found == found[-1]
    tied = torch.nn.functional.pad(same, (1, 0)) | torch.nn.functional.pad(same, (0, 1))
    if int((scores == found[-1]).sum()) > int(last.sum()):  # others as large are left out
        tied |= last
    equal = int(tied.sum())
    if equal > _MOST_EQUAL * count:
        raise options.not_served(
            "save_precomputed_indices",
            False,
            f"{equal} of the {count} weights that {target.own!r} changes are equal to another, and PEFT's order of "
            "equal ones differs between devices; save the checkpoint with the indices",
        )
    if equal:
        target.checkpoint.warn(
            f"{equal} of the {count} weights that {target.own!r} changes are equal to another: their order is that of "
            "PEFT on a CPU"
        )
    return flat


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
