"""Methods whose change of a weight has full rank: each becomes y += x ΔWᵀ, or a LowRank where that is smaller."""

import torch

from deltaserve.deltas.primitives import Dense, LowRank
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import WEIGHTS, Target, each

_LYCORIS = TARGETED | {"r", "alpha", "rank_pattern", "alpha_pattern"}
_LYCORIS_INERT = TRAINED | {"rank_dropout", "module_dropout", "use_effective_conv2d"}
LOHA_OPTIONS = options.Options(used=_LYCORIS, inert=_LYCORIS_INERT)
LOKR_OPTIONS = options.Options(
    used=_LYCORIS, inert=_LYCORIS_INERT | {"decompose_both", "decompose_factor", "rank_dropout_scale"}
)
C3A_OPTIONS = options.Options(used=TARGETED | {"block_size", "block_size_pattern", "bias"}, inert=TRAINED)
HIRA_OPTIONS = options.Options(used=TARGETED | {"r", "rank_pattern"}, inert=TRAINED | {"hira_dropout"})


def loha(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = s (w1a w1b) ⊙ (w2a w2b), s = alpha / r. Of rank r²: a LowRank where that is smaller. arXiv 2108.06098."""
    scales = _Scales(checkpoint)

    def one(target: Target, _: Weights) -> None:
        rank, scale = scales.of(target)
        a1, b1 = target.number("hada_w1_a", target.outputs, rank), target.number("hada_w1_b", rank, target.inputs)
        a2, b2 = target.number("hada_w2_a", target.outputs, rank), target.number("hada_w2_b", rank, target.inputs)
        if rank**2 * (target.inputs + target.outputs) < target.inputs * target.outputs:
            down = (b1.unsqueeze(1) * b2.unsqueeze(0)).reshape(-1, target.inputs)
            up = (a1.unsqueeze(2) * a2.unsqueeze(1)).reshape(target.outputs, -1)
            draft.put(target.name, LowRank(down, up, scale))
        else:
            draft.put(target.name, Dense(scale * (a1 @ b1) * (a2 @ b2)))

    each("loha", one)(checkpoint, draft, weights)


def lokr(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = s (w1 ⊗ w2); either factor may be a product of two. LyCORIS, arXiv 2309.14859."""
    scales = _Scales(checkpoint)

    def one(target: Target, _: Weights) -> None:
        rank, scale = scales.of(target)
        first, second = (_factor(target, f"lokr_{word}", rank) for word in ("w1", "w2"))
        shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
        if shape != (target.outputs, target.inputs):
            raise BadCheckpoint(
                f"the factors of {target.own!r} make a weight {list(shape)}; it has {[target.outputs, target.inputs]}"
            )
        draft.put(target.name, Dense(torch.kron(first, second) * scale))

    each("lokr", one)(checkpoint, draft, weights)


def _factor(target: Target, part: str, rank: int) -> torch.Tensor:
    whole = target.shape(part)
    if whole:
        if len(whole) != 2 or whole[0] > target.outputs or whole[1] > target.inputs:
            raise BadCheckpoint(
                f"tensor {target.name}.{part} has shape {list(whole)}, which is no factor of its weight"
            )
        return target.number(part, *whole)
    left, right = target.shape(f"{part}_a"), target.shape(f"{part}_b")
    rows, columns = (left or (1,))[0], (right or (1, 1))[-1]
    if rows > target.outputs or columns > target.inputs:
        raise BadCheckpoint(f"tensors {target.name}.{part}_a and _b are no factor of their weight")
    return target.number(f"{part}_a", rows, rank) @ target.number(f"{part}_b", rank, columns)


def c3a(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW of circulant blocks: block (p, q)[a, b] = kernel[p, q, (b − a) mod k] / in. arXiv 2407.19342."""
    size = options.integer(checkpoint.config, "block_size", 256)
    sizes = options.ranks(checkpoint.config, "block_size_pattern")

    def one(target: Target, _: Weights) -> None:
        k = target.setting(sizes, "block_size_pattern", size)
        if target.outputs % k or target.inputs % k:
            raise BadCheckpoint(f"config key 'block_size' is {k}, which does not divide {target.own!r}")
        kernel = target.number("c3a_kernel", target.outputs // k, target.inputs // k, k)
        turns = (torch.arange(k) - torch.arange(k).unsqueeze(1)) % k
        blocks = kernel[:, :, turns].permute(0, 2, 1, 3).reshape(target.outputs, target.inputs)
        draft.put(target.name, Dense(blocks / target.inputs))

    each("c3a", one, "c3a")(checkpoint, draft, weights)


def hira(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = W ⊙ (B A), without a scale. HiRA (ICLR 2025).

    At an embedding the change is not multiplied by what the embedding multiplies its rows by (Gemma).
    """
    rank, ranks = options.integer(checkpoint.config, "r", 32), options.ranks(checkpoint.config, "rank_pattern")

    def one(target: Target, weights: Weights) -> None:
        r = target.setting(ranks, "rank_pattern", rank)
        weight, looked_up = weights(target.name), target.site.type is SiteType.EMBEDDING
        word = "hira_embedding" if looked_up else "hira"
        a, b = target.number(f"{word}_A", r, target.inputs), target.number(f"{word}_B", target.outputs, r)
        change = weight * ((b @ a).T if looked_up else b @ a)
        if looked_up:
            draft.put(target.name, Dense(weight + change / target.site.factor, replace=True))
        else:
            draft.put(target.name, Dense(change))

    each("hira", one, types=WEIGHTS)(checkpoint, draft, weights)


class _Scales:
    """Rank and alpha / rank of each module."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self._rank, self._alpha = options.integer(config, "r", 8), options.number(config, "alpha", 8)
        self._ranks, self._alphas = options.ranks(config, "rank_pattern"), options.numbers(config, "alpha_pattern")

    def of(self, target: Target) -> tuple[int, float]:
        rank: int = target.setting(self._ranks, "rank_pattern", self._rank)
        return rank, target.setting(self._alphas, "alpha_pattern", self._alpha) / rank
