"""LoRA (arXiv 2106.09685) as PEFT writes it: rsLoRA, rank and alpha patterns, biases, lm_head."""

import math

import torch

from deltaserve.deltas.primitives import Dense, LowRank
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.draft import Draft
from deltaserve.formats.peft.matching import Patterns, targeted

_LATER = "this release does not serve it"
OPTIONS = options.Options(
    used=frozenset(
        {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        | {"rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "bias", "init_lora_weights"}
    ),
    inert=frozenset(
        {"lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "eva_config"}
    ),
    refused={
        "use_dora": f"DoRA scales by norms of the backbone's weights, and {_LATER}",
        "use_qalora": "QALoRA needs a quantised backbone",
        "use_bdlora": f"{_LATER} block-diagonal LoRA",
        "alora_invocation_tokens": f"activated LoRA acts on part of the rows, and {_LATER}",
        "arrow_config": "Arrow routes each token over several LoRA; it cannot be one delta",
        "kasa_config": f"KaSA changes the backbone's weights, and {_LATER}",
        "layer_replication": "it makes another backbone, with more layers",
        "target_parameters": f"{_LATER} LoRA on bare parameters",
        "trainable_token_indices": f"{_LATER} trainable tokens",
        "loftq_config": "LoftQ needs data that is not in the checkpoint",
        "corda_config": "CorDA needs data that is not in the checkpoint",
        "lora_ga_config": "LoRA-GA needs data that is not in the checkpoint",
        "ensure_weight_tying": f"{_LATER} LoRA on tied embeddings",
    },
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the backbone as it is."""


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y += s · (x Aᵀ) Bᵀ + s · b_B at each target; s = alpha / r, or alpha / √r with rsLoRA."""
    config = checkpoint.config
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise FailedPrecondition(
            f"config key 'init_lora_weights' is {start!r}, which changes the backbone's weights: convert the "
            "checkpoint to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "init_lora_weights"},
        )
    draft.kind("lora")
    rank, alpha = options.integer(config, "r", 8), options.number(config, "lora_alpha", 8)
    ranks, alphas = options.ranks(config, "rank_pattern"), options.numbers(config, "alpha_pattern")
    root, biased = options.flag(config, "use_rslora"), options.flag(config, "lora_bias")
    bias = options.choice(config, "bias", ("none", "all", "lora_only"))
    patterns = Patterns()
    matched = targeted(config, checkpoint.modules, patterns)
    checkpoint.warnings.extend(f"target_modules entry {entry!r} matches no module here" for entry in matched.idle)
    for own in matched.modules:
        module = checkpoint.name(own)
        if checkpoint.may_lack(module):
            continue
        _refuse_embedding(checkpoint, module)
        site = checkpoint.linear(module, "LoRA")
        r = patterns.first(ranks, own, "rank_pattern") or rank
        own_alpha = patterns.first(alphas, own, "alpha_pattern")
        scale = (alpha if own_alpha is None else own_alpha) / (math.sqrt(r) if root else r)
        a = checkpoint.take(f"{module}.lora_A.weight", (r, site.in_features))
        b = checkpoint.take(f"{module}.lora_B.weight", (site.out_features, r))
        draft.put(module, LowRank(a, b, scale))
        if biased:
            draft.shift(module, scale * checkpoint.take(f"{module}.lora_B.bias", (site.out_features,)).float())
        if checkpoint.has(f"{module}.base_layer.weight"):
            _base_weight(checkpoint, draft, module, (site.out_features, site.in_features), weights)
        if bias != "none" and site.bias is not None:
            _base_bias(checkpoint, draft, module, f"{module}.base_layer.bias")
    if bias == "all":
        for name in checkpoint.backbone.sites:
            if checkpoint.has(f"{name}.bias"):
                _base_bias(checkpoint, draft, name, f"{name}.bias")


def _refuse_embedding(checkpoint: Checkpoint, module: str) -> None:
    site = checkpoint.backbone.sites.get(module)
    if site is not None and site.type is SiteType.EMBEDDING:
        raise FailedPrecondition(
            f"config key 'target_modules' targets the embedding {module!r}: {_LATER} LoRA on embeddings",
            reason="OPTION_NOT_SERVED",
            metadata={"key": "target_modules", "module": module},
        )


def _base_bias(checkpoint: Checkpoint, draft: Draft, module: str, name: str) -> None:
    """A trained bias replaces the backbone's: a shift by the difference."""
    before = checkpoint.backbone.sites[module].bias
    if before is None:
        raise BadCheckpoint(f"tensor {name!r} is a bias, and {module!r} has none here", metadata={"tensor": name})
    after = checkpoint.take(name, tuple(before.shape)).float()
    if not torch.equal(after, before):
        draft.kind("bias")
        draft.shift(module, after - before)


def _base_weight(checkpoint: Checkpoint, draft: Draft, module: str, shape: tuple[int, ...], weights: Weights) -> None:
    """PEFT saves a targeted lm_head whole. Where it is the backbone's, it is left out; else it is this delta's."""
    name = f"{module}.base_layer.weight"
    saved, ours = checkpoint.take(name, shape), weights(module)
    if any(torch.equal(saved.to(kind).float(), ours) for kind in (torch.float32, torch.bfloat16, torch.float16)):
        return
    bias = checkpoint.backbone.sites[module].bias
    draft.kind("selective-module")
    draft.put(module, Dense(saved, bias, replace=True))
    checkpoint.warnings.append(
        f"{name} differs from the backbone's: this delta brings its own, {saved.numel()} numbers"
    )
