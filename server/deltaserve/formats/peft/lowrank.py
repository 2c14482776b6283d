"""Methods whose change of a weight has low rank, beside LoRA: each becomes one LowRank, y += (x Aᵀ) Bᵀ."""

import torch

from deltaserve.deltas.primitives import Dense, LowRank
from deltaserve.deltas.sites import Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import lora, options, tokens
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each

ADALORA_OPTIONS = options.Options(
    used=TARGETED | {"init_r", "lora_alpha", "rank_pattern", "bias", "trainable_token_indices", "ensure_weight_tying"},
    # LoRA's variants are fields of its config, and PEFT's AdaLoRA does nothing with them.
    inert=lora.OPTIONS.inert
    | {"alpha_pattern", "lora_bias", "kasa_config", "velora_config", "monteclora_config", "use_bdlora"}
    | {"r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
    | {"init_lora_weights", "use_rslora"},
    refused={
        **lora.OPTIONS.refused,
        "use_dora": "PEFT's AdaLoRA does not do DoRA",
        "target_parameters": "PEFT's AdaLoRA wraps modules alone",
    },
)
DELORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "rank_pattern", "bias"}, inert=TRAINED | {"delora_lambda", "lambda_pattern", "module_dropout"}
)
GRALORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "alpha", "gralora_k", "hybrid_r", "bias"}, inert=TRAINED | {"gralora_dropout"}
)
HRA_OPTIONS = options.Options(used=TARGETED | {"r", "apply_GS", "bias"}, inert=TRAINED)
MISS_OPTIONS = options.Options(
    used=TARGETED | {"r", "mini_r", "init_weights", "bias"}, inert=frozenset({"miss_dropout", "fan_in_fan_out"})
)


def adalora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = B diag(E) A · alpha / (init_r + 1e-5); the divisor stays init_r after pruning. arXiv 2303.10512."""
    start = options.integer(checkpoint.config, "init_r", 12)
    alpha = options.number(checkpoint.config, "lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(start)) / (start + 1e-5)

    def one(target: Target, _: Weights) -> None:
        shape = target.shape("lora_A")
        rank = shape[0] if len(shape) == 2 and shape[0] <= start else start
        if rank == 0:  # every rank of this module was pruned
            for part, empty in (("lora_A", (0, target.inputs)), ("lora_E", (0, 1)), ("lora_B", (target.outputs, 0))):
                target.take(part, *empty)
            return
        a = target.number("lora_A", rank, target.inputs) * target.number("lora_E", rank, 1)
        draft.put(target.name, LowRank(a, target.take("lora_B", target.outputs, rank), scale))

    each("adalora", one, "lora")(checkpoint, draft, weights)
    tokens.beside_lora(checkpoint, draft)


def delora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """A′ = A ⊙ ‖W‖ by columns, B′ = B λ / (r ‖A_k‖ ‖B_k‖), norms at least 1e-4. arXiv 2503.18225."""
    rank, ranks = options.integer(checkpoint.config, "r", 8), options.ranks(checkpoint.config, "rank_pattern")

    def one(target: Target, _: Weights) -> None:
        r = target.setting(ranks, "rank_pattern", rank)
        a, b = target.number("delora_A", r, target.inputs), target.number("delora_B", target.outputs, r)
        norms = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
        b = b * (target.number("delora_lambda", 1) / r / norms)
        draft.put(target.name, LowRank(a * target.number("delora_w_norm", target.inputs), b, 1.0))

    each("delora", one, "delora")(checkpoint, draft, weights)


def gralora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """k × k blocks, each of rank r / k: input block n to output block p by parts of A[n] and B[p]. arXiv 2505.20355."""
    config = checkpoint.config
    rank, blocks = options.integer(config, "r", 32), options.integer(config, "gralora_k", 2)
    hybrid = options.integer(config, "hybrid_r") if config.get("hybrid_r") else 0
    scale = options.number(config, "alpha", 64) / (rank + hybrid)
    part = rank // blocks

    def one(target: Target, _: Weights) -> None:
        if rank % blocks or target.inputs % blocks or target.outputs % blocks:
            raise BadCheckpoint(f"config key 'gralora_k' is {blocks}, which does not divide r and {target.own!r}")
        into, out = target.inputs // blocks, target.outputs // blocks
        a = target.number("gralora_A", blocks, into, rank).view(blocks, into, blocks, part)
        b = target.number("gralora_B", blocks, rank, out).view(blocks, blocks, part, out)
        down = torch.zeros(blocks, blocks, part, blocks, into)
        up = torch.zeros(blocks, out, blocks, blocks, part)
        for n in range(blocks):
            for p in range(blocks):
                down[n, p, :, n] = a[n, :, p].T
                up[p, :, n, p] = b[p, n].T
        down, up = down.view(-1, target.inputs), up.view(target.outputs, -1)
        if hybrid:
            down = torch.cat((down, target.number("gralora_A_general.weight", hybrid, target.inputs)))
            up = torch.cat((up, target.number("gralora_B_general.weight", target.outputs, hybrid)), 1)
        draft.put(target.name, LowRank(down, up, scale))

    each("gralora", one, "gralora")(checkpoint, draft, weights)


def hra(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = W (H − I), H = Π (I − 2 u_k u_kᵀ), of rank r; with Gram-Schmidt H = I − 2 U Uᵀ. arXiv 2405.17484."""
    rank, orthogonal = options.integer(checkpoint.config, "r", 8), options.flag(checkpoint.config, "apply_GS")

    def one(target: Target, weights: Weights) -> None:
        u = target.number("hra_u", target.inputs, rank)
        columns: list[torch.Tensor] = []
        done: list[torch.Tensor] = []
        for k in range(rank):
            column = u[:, k]
            if orthogonal:
                for before in done:
                    column = column - (before @ column) * before
            column = column / column.norm()
            # H_k − I = (H_{k−1} − I) − 2 H_{k−1} u_k u_kᵀ; orthogonal columns do not see each other.
            image = column.clone()
            if not orthogonal:
                for before, earlier in zip(done, columns, strict=True):
                    image = image + earlier * (before @ column)
            columns.append(-2 * image)
            done.append(column)
        b = weights(target.name) @ torch.stack(columns, 1)
        draft.put(target.name, LowRank(torch.stack(done), b, 1.0))

    each("hra", one, "hra")(checkpoint, draft, weights)


def miss(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW[:, j] = block[j mod r]; `mini` repeats the block over outputs, `bat` also multiplies W. arXiv 2409.15371."""
    rank, mini = options.integer(checkpoint.config, "r", 64), options.integer(checkpoint.config, "mini_r", 1)
    variant = checkpoint.config.get("init_weights", True)

    def one(target: Target, weights: Weights) -> None:
        if variant == "bat":
            draft.put(target.name, Dense(_bat(target, weights(target.name), rank)))
            return
        if variant == "mini":
            if target.outputs % mini:
                raise BadCheckpoint(f"config key 'mini_r' is {mini}, which does not divide {target.outputs} outputs")
            block = target.number("miss_block", rank, mini).repeat(1, target.outputs // mini)
        else:
            block = target.number("miss_block", rank, target.outputs)
        places = torch.arange(target.inputs) % rank
        pick = draft.base((places == torch.arange(rank).unsqueeze(1)).float())
        draft.put(target.name, LowRank(pick, block.T.contiguous(), 1.0))

    each("miss", one, "miss")(checkpoint, draft, weights)


def _bat(target: Target, weight: torch.Tensor, rank: int) -> torch.Tensor:
    if target.outputs % rank or target.inputs % rank:
        raise BadCheckpoint(f"config key 'r' is {rank}, which does not divide {target.own!r}")
    block = target.number("miss_block", target.outputs // rank, rank, rank)
    parts = weight.view(target.outputs // rank, rank, target.inputs // rank, rank).permute(2, 0, 1, 3)
    return (parts @ block + block).permute(1, 2, 0, 3).reshape(target.outputs, target.inputs)
