"""Methods that change part of W's singular value decomposition, which is repeated at load: PSOFT, OSF."""

import torch

from deltaserve.deltas.primitives import LowRank
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each
from deltaserve.formats.peft.turns import cayley, neumann, skew

PSOFT_OPTIONS = options.Options(
    used=TARGETED
    | {"r", "ab_svd_init", "psoft_svd", "psoft_orth", "psoft_mag_a", "psoft_mag_b"}
    | {"use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"}
    | {"psoft_svd_lowrank_niter", "random_seed"},
    # alpha / r divides the singular values and multiplies their product.
    inert=TRAINED | {"psoft_alpha", "psoft_dropout"},
)
OSF_OPTIONS = options.Options(
    used=frozenset({"target_modules"}),
    # How many singular values are the delta's, its tensors say.
    inert=frozenset({"effective_rank", "rank_pattern", "init_weights", "target_svd_config"}),
)


def psoft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = U S (R − I) Vᵀ in W's first r singular directions; R = diag(b) (I + Q) (I − Q)⁻¹ diag(a), Q skew.

    R may be a series for that, or any matrix; `pissa_init` puts √S on either side of R.
    """
    config = checkpoint.config
    rank = options.integer(config, "r", 32)
    halves = options.choice(config, "ab_svd_init", ("psoft_init", "pissa_init")) == "pissa_init"
    found_by_chance = options.choice(config, "psoft_svd", ("full", "lowrank")) == "lowrank"
    rounds, seed = (
        options.integer(config, "psoft_svd_lowrank_niter", 10, most=100),
        options.seed(config, "random_seed", 0),
    )
    turning = _Turning(checkpoint, rank)

    def one(target: Target, weights: Weights) -> None:
        if rank > min(target.inputs, target.outputs):
            raise BadCheckpoint(f"config key 'r' is {rank}, more than {target.own!r} has singular values")
        change = turning.of(target) - torch.eye(rank)
        weight = weights(target.name)
        if found_by_chance:
            u, s, v = _near(weight, rank, rounds, torch.Generator().manual_seed(seed))
        else:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
        before, after = (s[:rank].sqrt(),) * 2 if halves else (s[:rank], torch.ones(rank))
        # What is frozen follows from the backbone: it is the same for all deltas of one rank.
        a, b = draft.base(after.unsqueeze(1) * v[:rank]), draft.base(u[:, :rank] * before)
        draft.put(target.name, LowRank(a, b, 1.0, change))

    each("psoft", one)(checkpoint, draft, weights)


def _near(
    weight: torch.Tensor, rank: int, rounds: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], S [r], V [r, in] as torch.svd_lowrank finds them, from a generator of our own. arXiv 0909.4061."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    basis = torch.linalg.qr(tall @ torch.randn(tall.shape[1], rank, generator=random)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, v = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u = basis @ u
    return (u, s, v) if tall is weight else (v.T, s, u.T)


class _Turning:
    """R [r, r] of each module."""

    def __init__(self, checkpoint: Checkpoint, rank: int) -> None:
        config = checkpoint.config
        self._rank = rank
        self._turns = options.flag(config, "psoft_orth", True)
        self._before, self._after = (options.flag(config, f"psoft_mag_{side}", True) for side in "ab")
        self._series = options.flag(config, "use_cayley_neumann")
        self._terms = options.integer(config, "num_cayley_neumann_terms", 5, most=64)
        limited = config.get("cayley_neumann_eps") is not None
        self._limit = options.number(config, "cayley_neumann_eps", 0.0) if limited else None

    def of(self, target: Target) -> torch.Tensor:
        made = self._square(target)
        if self._after:
            made = target.number("psoft_R.vector_b", self._rank).unsqueeze(1) * made
        return made * target.number("psoft_R.vector_a", self._rank) if self._before else made

    def _square(self, target: Target) -> torch.Tensor:
        rank = self._rank
        if not self._turns:
            return target.number("psoft_R.weight", rank, rank)
        turn = skew(target.number("psoft_R.weight", rank * (rank - 1) // 2).unsqueeze(0), rank)
        if not self._series:
            return cayley(-turn)[0]
        norm = float(turn.norm())
        if self._limit is not None and norm > self._limit:
            turn = turn * (self._limit / (norm + 1e-12))
        return neumann(turn, self._terms)[0]


def osf(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """The smallest singular values and their vectors are the delta's own: ΔW = U S V − U₀ S₀ V₀. arXiv 2504.07097."""

    def one(target: Target, weights: Weights) -> None:
        if not target.has("osf_svd_params.S_low"):
            target.take("osf_svd_params.S_low", min(target.inputs, target.outputs))
        found = target.shape("osf_svd_params.S_low")
        most = min(target.inputs, target.outputs)
        if len(found) != 1 or found[0] > most:
            raise BadCheckpoint(
                f"tensor {target.name}.osf_svd_params.S_low has shape {list(found)}; the weight has {most} singular "
                "values"
            )
        (count,) = found
        u = target.number("osf_svd_params.U_low", target.outputs, count)
        u = u * target.number("osf_svd_params.S_low", count)
        v = target.number("osf_svd_params.V_low", count, target.inputs)
        if count == 0:
            return
        before = torch.linalg.svd(weights(target.name), full_matrices=False)
        first = most - count
        taken = before[0][:, first:] * before[1][first:]
        draft.product(target.name, torch.cat((v, before[2][first:])), torch.cat((u, -taken), 1))

    each("osf", one)(checkpoint, draft, weights)
