"""Methods whose modules share frozen or learned vectors: VeRA, PVeRA, VB-LoRA. Each becomes one LowRank per module.

VeRA's frozen matrices are bases: deltas of one rank and one projection key have the same.
"""

import math

import torch

from deltaserve.deltas.primitives import LowRank
from deltaserve.deltas.sites import Weights
from deltaserve.errors import FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each, targets

VERA_OPTIONS = options.Options(
    used=TARGETED | {"r", "projection_prng_key", "save_projection", "bias"},
    inert=TRAINED | {"vera_dropout", "d_initial"},
)
PVERA_OPTIONS = options.Options(
    used=TARGETED | {"r", "projection_prng_key", "save_projection", "bias", "sample_at_inference"},
    inert=TRAINED | {"pvera_dropout", "d_initial", "generator_seed"},
)
VBLORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "bias"},
    inert=TRAINED | {"vblora_dropout", "init_vector_bank_bound", "init_logits_std"},
)


def vera(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = diag(b) B diag(d) A; A [r, widest input] and B [widest output, r] are shared. arXiv 2310.11454."""
    rank = options.integer(checkpoint.config, "r", 256)
    _vera(checkpoint, draft, weights, "vera", rank, rank)


def pvera(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """VeRA whose d and A have a mean and a variance; what answers is the mean, their first r rows."""
    if options.flag(checkpoint.config, "sample_at_inference"):
        raise FailedPrecondition(
            "config key 'sample_at_inference' is true: its answers are random, and no two would be alike",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "sample_at_inference"},
        )
    rank = options.integer(checkpoint.config, "r", 256)
    _vera(checkpoint, draft, weights, "pvera", rank, 2 * rank)


def _vera(checkpoint: Checkpoint, draft: Draft, weights: Weights, word: str, rank: int, rows: int) -> None:
    found = list(targets(checkpoint, draft))
    widest = max(t.inputs for t in found), max(t.outputs for t in found)
    if options.flag(checkpoint.config, "save_projection", True):
        a = checkpoint.take(f"{word}_A", (rows, widest[0]))
        b = checkpoint.take(f"{word}_B", (widest[1], rank))
    else:
        first = found[0]
        if first.shape(f"{word}_lambda_d") != (rows,):  # the rank is what the file has, before anything is drawn
            first.take(f"{word}_lambda_d", rows)
        a, b = _drawn(checkpoint, rows, rank, widest)
    a, b = draft.base(a[:rank]), draft.base(b)

    def one(target: Target, _: Weights) -> None:
        inner = target.take(f"{word}_lambda_d", rows)[:rank].clone()
        outer = target.take(f"{word}_lambda_b", target.outputs)
        draft.put(target.name, LowRank(a[:, : target.inputs], b[: target.outputs], 1.0, inner, outer))

    each(word, one, word)(checkpoint, draft, weights)


def _drawn(checkpoint: Checkpoint, rows: int, rank: int, widest: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's projections from their seed: Kaiming's uniform distribution, A first, on torch's CPU generator."""
    random = torch.Generator().manual_seed(options.seed(checkpoint.config, "projection_prng_key", 0))
    made = []
    for shape, fan in (((rows, widest[0]), widest[0]), ((widest[1], rank), rank)):
        bound = math.sqrt(6 / fan)
        made.append(torch.empty(shape).uniform_(-bound, bound, generator=random))
    return made[0], made[1]


def vblora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """Parts of A and B are mixtures of the top k vectors of a shared bank [vectors, length]. arXiv 2405.15179."""
    config = checkpoint.config
    rank, vectors = options.integer(config, "r", 4), options.integer(config, "num_vectors", 256)
    length, top = options.integer(config, "vector_length", 256), options.integer(config, "topk", 2)
    bank = checkpoint.take("vblora_vector_bank", (vectors, length)).float()

    def mixed(target: Target, part: str, tiles: tuple[int, int]) -> torch.Tensor:
        """[*tiles, length]."""
        if target.has(f"{part}_topk_indices"):
            places = target.checkpoint.integers(f"{target.name}.{part}_topk_indices", (*tiles, top), vectors)
            told = target.number(f"{part}_topk_weights", *tiles, top - 1)
            shares = torch.cat((told, 1 - told.sum(-1, keepdim=True)), -1)
        else:
            logits, places = target.number(part, *tiles, vectors).topk(top, -1)
            shares = logits.softmax(-1)
        return (shares.unsqueeze(-1) * bank[places]).sum(-2)

    def one(target: Target, _: Weights) -> None:
        a = mixed(target, "vblora_logits_A", (rank, target.inputs // length)).reshape(rank, -1)
        b = mixed(target, "vblora_logits_B", (target.outputs // length, rank))
        draft.put(target.name, LowRank(a, b.transpose(1, 2).reshape(-1, rank), 1.0))

    each("vblora", one, "vblora")(checkpoint, draft, weights)
