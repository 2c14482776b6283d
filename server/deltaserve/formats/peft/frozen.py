"""Methods that learn scales of frozen bases which many modules share: RandLoRA, FRoD. Each becomes one Dense."""

import torch

from deltaserve.deltas.primitives import Dense
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each, targets

RANDLORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "randlora_alpha", "save_projection", "bias"},
    inert=TRAINED | {"projection_prng_key", "sparse", "very_sparse", "randlora_dropout"},
)
FROD_OPTIONS = options.Options(
    used=TARGETED | {"save_projection", "bias"},
    inert=TRAINED
    | {"projection_prng_key", "frod_dropout", "sparse_rate", "regularization_alpha", "progressbar"}
    | {"runtime_offload_base_weight"},
)


def randlora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = s B (λ ⊙ A ⊙ γ), all flattened over n bases of rank r, transposed where out < in. arXiv 2502.00987.

    A [r, 1, narrow] and B [wide, n, r] are random, shared and cut to size; λ [r, n] and γ [n, narrow] are learned.
    """
    _saved(checkpoint, "PEFT draws its bases in bfloat16 or float16, by what the machine can do")
    config = checkpoint.config
    rank, alpha = options.integer(config, "r", 32), options.number(config, "randlora_alpha", 640)
    found = list(targets(checkpoint, draft))
    narrow, wide = sorted((max(t.outputs for t in found), max(t.inputs for t in found)))
    shapes = {"randlora_A": (rank, 1, narrow), "randlora_B": (wide, -(-narrow // rank), rank)}
    bases = {name: checkpoint.take(name, shape).float() for name, shape in shapes.items()}

    def one(target: Target, _: Weights) -> None:
        for name, shape in shapes.items():
            # PEFT saves the bases once more below each module, and reads them all into the same place.
            if target.has(name) and not torch.equal(target.number(name, *shape), bases[name]):
                raise BadCheckpoint(f"tensor {target.name}.{name} is not the {name} that all modules share")
        least, most = sorted((target.inputs, target.outputs))
        count = -(-least // rank)
        learned = target.number("randlora_lambda", rank, count).unsqueeze(2)
        a = learned * bases["randlora_A"][:, :, :least] * target.number("randlora_gamma", count, least)
        change = alpha / rank * bases["randlora_B"][:most, :count].flatten(1) @ a.flatten(0, 1)
        draft.put(target.name, Dense(change if target.inputs == least else change.T.contiguous()))

    each("randlora", one, "randlora")(checkpoint, draft, weights)


def frod(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """W′ = U (S + diag(l)) Vᵀ: V [in, in] by category of modules, U by W = U diag(·) Vᵀ, S sparse, l learned.

    doi 10.1609/aaai.v40i31.39813. The whole weight is the delta's own.
    """
    _saved(checkpoint, "its bases come out of a decomposition that differs from machine to machine")
    bases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def one(target: Target, weights: Weights) -> None:
        width = target.inputs
        category = _category(target.own)
        if category not in bases:
            bases[category] = _bases(checkpoint, category, width)
        v, index = bases[category]
        if v.shape[0] != width:
            raise BadCheckpoint(f"{target.own!r} has {width} inputs, and frod_V.{category} is {list(v.shape)}")
        middle = torch.diag(target.number("frod_lambda_l", width))
        values = target.number("frod_lambda_s_values", index.shape[1])
        middle.index_put_((index[0], index[1]), values, accumulate=True)
        weight = _directions(weights(target.name), v) @ middle @ v.T
        draft.put(target.name, Dense(weight, target.site.bias, replace=True))

    each("frod", one, "frod")(checkpoint, draft, weights)


def _saved(checkpoint: Checkpoint, why: str) -> None:
    if not options.flag(checkpoint.config, "save_projection", True):
        raise options.not_served("save_projection", False, f"{why}; save the checkpoint with them")


def _bases(checkpoint: Checkpoint, category: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V [in, in] fp32, and where S is not zero: int64 [2, n]."""
    v = checkpoint.take(f"frod_V.{category}", (width, width)).float()
    size = checkpoint.integers(f"frod_s_size.{category}", (2,), width + 1)
    name = f"frod_s_indices.{category}"
    shape = checkpoint.shape(name) if checkpoint.has(name) else (2, 0)
    if size.tolist() != [width, width] or len(shape) != 2 or shape[1] > width * width:
        raise BadCheckpoint(f"tensors {name} and frod_s_size.{category} are not of a matrix {[width, width]}")
    return v, checkpoint.integers(name, (2, shape[1]), width)


def _directions(weight: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """U [out, in]: the columns of W V⁻ᵀ, each of length 1 (or nothing, where it has none)."""
    try:
        columns = torch.linalg.solve(v.double(), weight.double().T).T
    except RuntimeError:  # V is singular
        columns = weight.double() @ torch.linalg.pinv(v.double(), rtol=1e-6).T
    lengths = columns.norm(dim=0)
    return torch.where(lengths > 1e-12, columns / lengths, 0.0).float()


def _category(own: str) -> str:
    """PEFT's name for modules of one kind in all layers, from the end of a module's name."""
    parts = own.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"
