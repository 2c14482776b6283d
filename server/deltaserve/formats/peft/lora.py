"""LoRA (arXiv 2106.09685) as PEFT writes it: rsLoRA, rank and alpha patterns, biases, lm_head."""

import math
from collections.abc import Callable, Mapping

import torch

from deltaserve.deltas.primitives import Affine, Dense, LowRank
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import FailedPrecondition
from deltaserve.formats.peft import options, tokens
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.targets import LINEARS, Target, each

_LATER = "this release does not serve it"
OPTIONS = options.Options(
    used=frozenset(
        {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        | {"rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "bias", "init_lora_weights"}
        | {"use_dora", "kasa_config", "trainable_token_indices"}
    ),
    inert=frozenset(
        {"lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "eva_config"}
    ),
    refused={
        "use_qalora": "QALoRA needs a quantised backbone",
        "use_bdlora": f"{_LATER} block-diagonal LoRA",
        "alora_invocation_tokens": f"activated LoRA acts on part of the rows, and {_LATER}",
        "arrow_config": "Arrow routes each token over several LoRA; it cannot be one delta",
        "layer_replication": "it makes another backbone, with more layers",
        "target_parameters": f"{_LATER} LoRA on bare parameters",
        "loftq_config": "LoftQ needs data that is not in the checkpoint",
        "corda_config": "CorDA needs data that is not in the checkpoint",
        "lora_ga_config": "LoRA-GA needs data that is not in the checkpoint",
        "ensure_weight_tying": f"{_LATER} LoRA on tied embeddings",
    },
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the backbone as it is."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, in] and B [out, r], fp32."""


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y += s · (x Aᵀ) Bᵀ + s · b_B at each target; s = alpha / r, or alpha / √r with rsLoRA."""
    config = checkpoint.config
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS and start not in _STARTS:
        raise FailedPrecondition(
            f"config key 'init_lora_weights' is {start!r}, which changes the backbone's weights in a way that the "
            "checkpoint does not tell: convert it to plain LoRA (path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained)",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "init_lora_weights"},
        )
    rank, alpha = options.integer(config, "r", 8), options.number(config, "lora_alpha", 8)
    ranks, alphas = options.ranks(config, "rank_pattern"), options.numbers(config, "alpha_pattern")
    root, biased = options.flag(config, "use_rslora"), options.flag(config, "lora_bias")
    magnitude, kasa = options.flag(config, "use_dora"), bool(config.get("kasa_config"))

    def one(target: Target, weights: Weights) -> None:
        looked_up = target.site.type is SiteType.EMBEDDING
        r = target.setting(ranks, "rank_pattern", rank)
        scale = target.setting(alphas, "alpha_pattern", alpha) / (math.sqrt(r) if root else r)
        a = target.take("lora_embedding_A" if looked_up else "lora_A.weight", r, target.inputs)
        b = target.take("lora_embedding_B" if looked_up else "lora_B.weight", target.outputs, r)
        if kasa:
            a = a.float() * target.number("lora_diag", r).unsqueeze(1)
        subtract = _tail if kasa else _STARTS.get(start)
        taken = None if subtract is None else subtract(weights(target.name), r)
        part = LowRank(a, b, scale)
        if taken is not None:
            part = LowRank(torch.cat((a.float(), taken[0])), torch.cat((scale * b.float(), -taken[1]), 1), 1.0)
        draft.put(target.name, part)
        if magnitude:
            _magnitude(target, part, weights(target.name))
        if biased:
            draft.shift(target.name, scale * target.number("lora_B.bias", target.outputs))
        if target.has("base_layer.weight"):
            _base_weight(target, weights)

    each("lora", one, "lora", types=(*LINEARS, SiteType.EMBEDDING))(checkpoint, draft, weights)
    tokens.beside_lora(checkpoint, draft)
    if magnitude:
        draft.kind("dora")


def _magnitude(target: Target, part: LowRank, weight: torch.Tensor) -> None:
    """DoRA (arXiv 2402.09353): y = g ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b with g = m / ‖W + s B A‖ by output rows.

    Our scale acts after the sum, so the shift gives the bias back: (1 − g) b.
    """
    change = part.scale * part.b.float() @ part.a.float()
    looked_up = target.site.type is SiteType.EMBEDDING  # stored [vocabulary, width]: a norm for each hidden unit
    norms = (weight + change.T).norm(dim=0) if looked_up else (weight + change).norm(dim=1)
    gain = target.number("lora_magnitude_vector", target.outputs) / norms
    bias = target.site.bias
    target.draft.put(target.name, Affine(scale=gain, shift=None if bias is None else (1 - gain) * bias))


def _principal(weight: torch.Tensor, rank: int) -> Pair:
    """What PiSSA (arXiv 2404.02948) takes out of W: its `rank` largest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]


def _tail(weight: torch.Tensor, rank: int) -> Pair:
    """What KaSA (arXiv 2412.06071) takes out of W: its `rank` smallest singular values."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[-rank:], u[:, -rank:] * s[-rank:]


_STARTS: Mapping[object, Callable[[torch.Tensor, int], Pair]] = {"pissa": _principal}
"""Starts that PEFT repeats at load and subtracts from the backbone's weight."""


def _base_weight(target: Target, weights: Weights) -> None:
    """PEFT saves a targeted lm_head whole. Where it is the backbone's, it is left out; else it is this delta's."""
    ours = weights(target.name)
    saved = target.take("base_layer.weight", *ours.shape)
    if any(torch.equal(saved.to(kind).float(), ours) for kind in (torch.float32, torch.bfloat16, torch.float16)):
        return
    target.draft.kind("selective-module")
    target.draft.put(target.name, Dense(saved, target.site.bias, replace=True))
    target.checkpoint.warn(
        f"{target.name}.base_layer.weight differs from the backbone's: this delta has its own {saved.numel()}"
    )
