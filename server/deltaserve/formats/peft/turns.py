"""Methods that turn rows by block-diagonal matrices: OFT, BOFT, RoAd. Never expanded to a dense weight."""

import math
from collections.abc import Callable, Mapping

import torch

from deltaserve.deltas.primitives import Affine, Block
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import WEIGHTS, Target, each

OFT_OPTIONS = options.Options(
    used=TARGETED
    | {"r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "bias"},
    inert=TRAINED | {"module_dropout"},
)
BOFT_OPTIONS = options.Options(
    used=TARGETED | {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "bias"},
    inert=TRAINED | {"boft_dropout"},
)
ROAD_OPTIONS = options.Options(used=TARGETED | {"variant", "group_size"}, inert=TRAINED)


def oft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y = (x R) Wᵀ + b, R of blocks by Cayley's transform of a skew matrix Q, or a series for it. arXiv 2306.07280.

    At an embedding the rows that are looked up turn: E[x] R.
    """
    config = checkpoint.config
    series = options.flag(config, "use_cayley_neumann", True)
    terms = options.integer(config, "num_cayley_neumann_terms", 5, most=64)
    constrained, eps = options.flag(config, "coft"), options.number(config, "eps", 6e-5)
    shared = options.flag(config, "block_share")

    def one(target: Target, _: Weights) -> None:
        looked_up = target.site.type is SiteType.EMBEDDING
        part, turned = ("oft_embedding_R.weight", target.outputs) if looked_up else ("oft_R.weight", target.inputs)
        found = target.shape(part)
        numbers = found[1] if len(found) == 2 else 0
        width = round((1 + (1 + 8 * numbers) ** 0.5) / 2)
        count = 1 if shared else turned // max(width, 1)
        if turned % max(width, 1) or width * (width - 1) // 2 != numbers:
            raise BadCheckpoint(f"tensor {target.name}.{part} has shape {list(found)}, which makes no blocks")
        turn = skew(target.number(part, count, numbers), width)
        if constrained:
            norms = turn.flatten(1).norm(dim=1)
            turn = turn * (eps * count**-0.5 / norms).clamp_max(1.0).view(-1, 1, 1)
        blocks = neumann(turn, terms) if series else cayley(turn)
        draft.put(target.name, Block(blocks.expand(turned // width, width, width).contiguous(), outputs=looked_up))

    each("oft", one, "oft", WEIGHTS)(checkpoint, draft, weights)


def skew(upper: torch.Tensor, width: int) -> torch.Tensor:
    """[n, width, width] from upper triangles [n, width (width − 1) / 2], row by row."""
    made = torch.zeros(upper.shape[0], width, width)
    rows, columns = torch.triu_indices(width, width, 1)
    made[:, rows, columns] = upper
    return made - made.transpose(1, 2)


def neumann(turn: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2 Q + 2 Q² + ... + 2 Q^(t−2) + Q^(t−1), as PEFT sums it: not quite orthogonal. Q [n, width, width].

    With t = 3 PEFT's loop does not run, and its sum is that of four terms; with t = 2 it is I + 2 Q.
    """
    total = torch.eye(turn.shape[-1]).repeat(turn.shape[0], 1, 1)
    if terms > 1:
        total = total + 2 * turn
    if terms > 2:
        power = turn @ turn
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ turn
            total = total + 2 * power
        total = total + power @ turn
    return total


def cayley(turn: torch.Tensor) -> torch.Tensor:
    """(I − Q) (I + Q)⁻¹."""
    eye = torch.eye(turn.shape[-1])
    turned: torch.Tensor = torch.linalg.solve(eye + turn, eye - turn, left=False)
    return turned


def boft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y = s ⊙ (x C Wᵀ) + b, C = (I − K) (I + K)⁻¹ with K the skew part of R. arXiv 2311.06243."""

    def one(target: Target, _: Weights) -> None:
        found = target.shape("boft_R")
        if len(found) != 4 or found[2] != found[3] or found[1] * found[2] != target.inputs:
            raise BadCheckpoint(f"tensor {target.name}.boft_R has shape {list(found)}, which makes no blocks here")
        if found[0] != 1:
            raise FailedPrecondition(
                f"{target.own!r} has {found[0]} butterfly factors: PEFT makes and reads more than one only with a CUDA "
                "extension that it compiles, and without it there is nothing to compare an answer with",
                reason="OPTION_NOT_SERVED",
                metadata={"key": "boft_n_butterfly_factor"},
            )
        r = target.number("boft_R", *found)[0]
        draft.put(target.name, Block(cayley((r - r.transpose(1, 2)) / 2)))
        scale, bias = target.number("boft_s", target.outputs, 1).flatten(), target.site.bias
        draft.put(target.name, Affine(scale=scale, shift=None if bias is None else (1 - scale) * bias))

    each("boft", one, "boft")(checkpoint, draft, weights)


def road(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """Pairs (j, j + g/2) of each group of g outputs turn by θ and stretch by α, the bias included. arXiv 2409.00119."""
    variant = options.choice(checkpoint.config, "variant", ("road_1", "road_2", "road_4"))
    group = options.integer(checkpoint.config, "group_size", 64)

    def one(target: Target, _: Weights) -> None:
        if target.outputs % group or group % 2:
            raise BadCheckpoint(f"config key 'group_size' is {group}, which does not divide {target.outputs} outputs")
        count, half = target.outputs // group, group // 2
        shape = _ROAD_SHAPES[variant](count, half)
        theta, alpha = (
            target.number(f"road_{word}", math.prod(shape)).view(shape).expand(count, shape[1], 2, half)
            for word in ("theta", "alpha")
        )
        straight, crossed = alpha[:, 0] * theta[:, 0].cos(), alpha[:, -1] * theta[:, -1].sin()
        blocks = torch.stack((straight[:, 0], crossed[:, 1], -crossed[:, 0], straight[:, 1]), 1)
        blocks = blocks.view(count, 2, 2, half)
        draft.put(target.name, Block(blocks, outputs=True))

    each("road", one)(checkpoint, draft, weights)


_ROAD_SHAPES: Mapping[str, Callable[[int, int], tuple[int, int, int, int]]] = {
    "road_1": lambda count, half: (count, 1, 1, half),
    "road_2": lambda count, half: (count, 1, 2, half),
    "road_4": lambda count, half: (count, 2, 2, half),
}
"""Groups, numbers for cosine and sine apart or together, halves apart or together, pairs."""
