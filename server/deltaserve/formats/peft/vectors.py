"""Methods that mix what many modules or tasks share: Uni-LoRA, TinyLoRA, Poly. Each module becomes one LowRank."""

import numpy
import torch

from deltaserve.deltas.primitives import LowRank
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.matching import Patterns, targeted
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import WEIGHTS, Target, each, targets

UNILORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "proj_seed", "theta_d_length", "save_indices", "bias"},
    inert=TRAINED | {"unilora_dropout", "init_theta_d_bound"},
)
TINYLORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "u", "weight_tying", "projection_seed", "save_projection", "bias"},
    inert=TRAINED | {"tinylora_dropout", "init_v_bound"},
)
POLY_OPTIONS = options.Options(
    used=TARGETED | {"r", "n_tasks", "n_skills", "n_splits", "poly_type"}, inert=frozenset({"init_weights"})
)

_LONGEST = 1 << 26
"""Of a vector, and of what is drawn for one module."""

_Half = tuple[torch.Tensor, torch.Tensor]
"""Of A or B: which number of θ stands at each place, and times what."""


def unilora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """A = θ[i] ⊙ c, B = θ[j] ⊙ d: one vector θ, spread over all modules and scaled. arXiv 2506.00799."""
    config = checkpoint.config
    rank = options.integer(config, "r", 4)
    theta = checkpoint.take("unilora_theta_d", (options.integer(config, "theta_d_length", 256, most=_LONGEST),)).float()
    saved = options.flag(config, "save_indices")
    dealt = {} if saved else _dealt(checkpoint, draft, rank, theta.shape[0])

    def half(target: Target, word: str, shape: tuple[int, int]) -> _Half:
        if not saved:
            return dealt[target.name, word]
        index = target.checkpoint.integers(f"{target.name}.unilora_indices_{word}", shape, theta.shape[0])
        return index, target.number(f"unilora_scales_{word}", *shape)

    def one(target: Target, _: Weights) -> None:
        shapes = {"A": (rank, target.inputs), "B": (target.outputs, rank)}
        a, b = (theta[index] * scale for index, scale in (half(target, *told) for told in shapes.items()))
        draft.put(target.name, LowRank(a, b, 1.0))

    each("unilora", one, "unilora")(checkpoint, draft, weights)


def _dealt(checkpoint: Checkpoint, draft: Draft, rank: int, length: int) -> dict[tuple[str, str], _Half]:
    """θ's places as PEFT deals them from a seed: evenly, shuffled by numpy, in the model's order, A before B.

    What one module gets depends on all that come before it, so that it must be known which there were.
    """
    config = checkpoint.config
    found = list(targets(checkpoint, draft))
    matched = targeted(config, checkpoint.modules, Patterns()).modules
    if len(matched) != len(found) and config.get("task_type") is None:
        raise FailedPrecondition(
            "config key 'task_type' is None: whether the model had all the modules that are targeted is not known, "
            "and the numbers depend on it; save the checkpoint with save_indices",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "task_type"},
        )
    places = sum(rank * (t.inputs + t.outputs) for t in found)
    if places > sum(t.inputs * t.outputs for t in found) or places < 1:
        raise BadCheckpoint(f"config key 'r' is {rank}: A and B would have more numbers than the weights themselves")
    random = numpy.random.default_rng(options.seed(config, "proj_seed", 42))
    order = numpy.repeat(numpy.arange(length), places // length)
    if places % length:
        order = numpy.concatenate([order, random.choice(length, size=places % length, replace=False)])
    random.shuffle(order)
    index = torch.as_tensor(order, dtype=torch.long)
    scales = torch.bincount(index, minlength=length).float().rsqrt()[index]
    dealt: dict[tuple[str, str], _Half] = {}
    start = 0
    for target in found:
        for word, shape in (("A", (rank, target.inputs)), ("B", (target.outputs, rank))):
            end = start + shape[0] * shape[1]
            dealt[target.name, word] = (index[start:end].view(shape), scales[start:end].view(shape))
            start = end
    return dealt


def tinylora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = B (Σ v_u P_u) A: A and B of W's singular vectors, P random, v shared by a group. arXiv 2602.04118."""
    config = checkpoint.config
    rank, length = options.integer(config, "r", 2), options.integer(config, "u", 64)
    tying, seed = options.number(config, "weight_tying", 0.0), options.seed(config, "projection_seed", 42)
    saved = options.flag(config, "save_projection", True)
    order = {target.name: k for k, target in enumerate(targets(checkpoint, draft, WEIGHTS))}
    groups = max(1, round(len(order) * (1 - tying)))
    size = max(1, len(order) // groups)
    vectors: dict[int, torch.Tensor] = {}

    def one(target: Target, _: Weights) -> None:
        k = order[target.name]
        group = min(k // size, groups - 1)
        if group not in vectors:
            vectors[group] = checkpoint.take(f"tinylora_v.{group}", (length,)).float()
        r = min(rank, target.inputs, target.outputs)
        looked_up = target.site.type is SiteType.EMBEDDING  # W is stored [vocabulary, width], and so are A and B
        rows, columns = (target.inputs, target.outputs) if looked_up else (target.outputs, target.inputs)
        a, b = target.take("tinylora_A", r, columns), target.take("tinylora_B", rows, r)
        if saved and target.has("tinylora_P"):
            drawn = target.number("tinylora_P", length, r, r)
        elif length * r * r > _LONGEST:
            raise BadCheckpoint(f"config keys 'u' and 'r' are {length} and {rank}: their projection is too large")
        else:
            random = torch.Generator().manual_seed(seed + k)
            drawn = torch.normal(0.0, r**-0.5, (length, r, r), generator=random)
        middle = torch.einsum("u,uij->ij", vectors[group], drawn)
        if looked_up:  # PEFT adds to what the embedding has multiplied by its factor (Gemma)
            a, b, middle, scale = b.T, a.T, middle.T.contiguous(), 1 / target.site.factor
        else:
            scale = 1.0
        # What is frozen follows from the backbone: it is the same for all deltas of one rank.
        draft.put(target.name, LowRank(draft.base(a), draft.base(b), scale, middle))

    each("tinylora", one, "tinylora", WEIGHTS)(checkpoint, draft, weights)


def poly(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = (A B)ᵀ / r; A and B in parts, each a mixture of skills by the task's weights σ(logits). arXiv 2202.13914."""
    config, task = checkpoint.config, draft.task_id
    assert task is not None
    tasks = options.integer(config, "n_tasks", 1)
    options.choice(config, "poly_type", ("poly",))
    rank, skills = options.integer(config, "r", 8), options.integer(config, "n_skills", 4)
    parts = options.integer(config, "n_splits", 1)

    def one(target: Target, _: Weights) -> None:
        if target.inputs % parts or target.outputs % parts:
            raise options.wrong("n_splits", f"is {parts}, which does not divide {target.own!r}")
        logits = target.number("poly_router.module_logits", tasks, parts * skills)
        shares = logits[task].view(parts, skills).sigmoid()
        shares = shares / (shares.sum(1, keepdim=True) + 1e-12)
        a = target.number("poly_lora_A", parts, skills, target.inputs // parts, rank)
        b = target.number("poly_lora_B", parts, skills, rank, target.outputs // parts)
        down = torch.einsum("qs,qsdr->rqd", shares, a).reshape(rank, target.inputs)
        up = torch.einsum("qs,qsrd->qdr", shares, b).reshape(target.outputs, rank)
        draft.put(target.name, LowRank(down, up, 1 / rank))

    each("poly", one)(checkpoint, draft, weights)
