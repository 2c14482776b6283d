"""LoRA (arXiv 2106.09685) as PEFT writes it: rsLoRA, rank and alpha patterns, DoRA, biases, embeddings, lm_head."""

import math
from dataclasses import dataclass

import torch

from deltaserve.deltas.primitives import Affine, LowRank
from deltaserve.deltas.sites import SiteType, Weights
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import invocation, options, starts, ties, tokens
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.targets import WEIGHTS, Target, biases, own_weight, parameters, targets

OPTIONS = options.Options(
    used=frozenset(
        {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        | {"rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "bias", "init_lora_weights"}
        | {"use_dora", "kasa_config", "trainable_token_indices", "use_bdlora", "target_parameters"}
        | {"velora_config", "monteclora_config", "ensure_weight_tying", invocation.KEY}
    ),
    inert=frozenset(
        {"lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size", "eva_config"}
    ),
    refused={
        "use_qalora": "QALoRA needs a quantised backbone",
        "arrow_config": "Arrow routes each token over several LoRA; it cannot be one delta",
        "layer_replication": "it makes another backbone, with more layers",
        "loftq_config": "LoftQ needs data that is not in the checkpoint",
        "corda_config": "CorDA needs data that is not in the checkpoint",
        "lora_ga_config": "LoRA-GA needs data that is not in the checkpoint",
    },
)


@dataclass(frozen=True)
class _Sizes:
    """What the config says of all targets."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    root: bool

    def of(self, target: Target, own: str) -> tuple[int, float]:
        """Rank and scale of a module, which PEFT knows as `own` when it asks."""
        r = target.patterns.first(self.ranks, own, "rank_pattern") or self.rank
        alpha = target.patterns.first(self.alphas, own, "alpha_pattern")
        return r, (self.alpha if alpha is None else alpha) / (math.sqrt(r) if self.root else r)


def lower(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """y += s · (x Aᵀ) Bᵀ + s · b_B at each target; s = alpha / r, or alpha / √r with rsLoRA."""
    config = checkpoint.config
    draft.kind("lora")
    invocation.lower(checkpoint, draft)
    sizes = _Sizes(
        options.integer(config, "r", 8),
        options.number(config, "lora_alpha", 8),
        options.ranks(config, "rank_pattern"),
        options.numbers(config, "alpha_pattern"),
        options.flag(config, "use_rslora"),
    )
    bare = list(parameters(checkpoint, draft))
    # Where parameters are targeted, an empty list means no module; else PEFT saves it with the names it found.
    found = [] if bare and not config.get("target_modules") else _modules(checkpoint, draft, weights, sizes)
    for target in bare:
        _parameter(target, sizes, weights)
    biases(checkpoint, draft, [*found, *bare], "lora")
    tokens.beside_lora(checkpoint, draft)


def _modules(checkpoint: Checkpoint, draft: Draft, weights: Weights, sizes: _Sizes) -> list[Target]:
    config = checkpoint.config
    subtract = starts.taken(config.get("init_lora_weights"))
    biased, magnitude = options.flag(config, "lora_bias"), options.flag(config, "use_dora")
    kasa, blocks = bool(config.get("kasa_config")), starts.Blocks(config.get("use_bdlora"))
    if kasa:
        subtract = starts.tail
    tie = ties.Tie(checkpoint)
    found = tie.first(targets(checkpoint, draft, WEIGHTS, tie.names))
    for target in checkpoint.work.steps(found):
        invocation.check(target)
        looked_up = target.site.type is SiteType.EMBEDDING
        r, scale = sizes.of(target, target.own)
        r = tie.rank(target, r)
        if looked_up:
            a = target.take("lora_embedding_A", r, target.inputs)
            b = target.take("lora_embedding_B", target.outputs, r)
        else:
            a, b = _pair(target, r, blocks)
        tie.check(target, a, b)
        if kasa:
            a = a.float() * target.number("lora_diag", r).unsqueeze(1)
        # A weight that is saved is what the start left of it.
        saved, own = target.has("base_layer.weight"), own_weight(target, weights)
        if own is not None and draft.invocation:
            what = f"{target.name}.base_layer.weight differs from the backbone's, and acts on every token"
            raise options.not_served(invocation.KEY, list(draft.invocation), what)
        if saved:
            tie.bring(target, own)
        part = LowRank(a, b, scale)
        if subtract is not None and not looked_up and not saved:  # PEFT starts so at linear layers alone
            if subtract is starts.orthonormal and target.site.type is SiteType.CONV1D:
                raise options.not_served("init_lora_weights", "olora", f"PEFT cannot start so at {target.own!r}")
            part = _without(target, part, subtract, weights(target.name))
        draft.put(target.name, part)
        if magnitude:
            own = ties.replaced(target)
            _magnitude(target, part, weights(target.name) if own is None else own)
        if biased:
            draft.shift(target.name, scale * target.number("lora_B.bias", target.outputs))
        _leave_out_training(target)
    if magnitude:
        draft.kind("dora")
    return found


def _pair(target: Target, r: int, blocks: starts.Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r]; with BD-LoRA one of them is of diagonal blocks."""
    across, up = blocks.at(target.own)
    if target.inputs % across or r % blocks.count or target.outputs % up:
        raise options.wrong("use_bdlora", f"has {blocks.count} blocks, which do not divide r and {target.own!r}")
    a = starts.spread(target.take("lora_A.weight", r, target.inputs // across), across)
    return a, starts.spread(target.take("lora_B.weight", target.outputs, r // up), up)


def _parameter(target: Target, sizes: _Sizes, weights: Weights) -> None:
    """LoRA on the weight as it is stored, P += s B A: of a Conv1D or an embedding A and B change places."""
    for key in ("use_dora", "lora_bias", "kasa_config", "velora_config", "use_bdlora", "monteclora_config"):
        if target.checkpoint.config.get(key):
            raise options.wrong(key, "is set beside target_parameters; PEFT allows one of them")
    subtract = starts.taken(target.checkpoint.config.get("init_lora_weights"))
    r, scale = sizes.of(target, f"{target.own}.weight")
    turned = target.site.type is not SiteType.LINEAR
    rows, columns = (target.inputs, target.outputs) if turned else (target.outputs, target.inputs)
    part = LowRank(target.take("lora_A.weight", r, columns), target.take("lora_B.weight", rows, r), scale)
    if subtract is not None:
        weight = weights(target.name)
        part = _without(target, part, subtract, weight.T if target.site.type is SiteType.CONV1D else weight)
    if turned:
        part = LowRank(part.b.T.contiguous(), part.a.T.contiguous(), part.scale)
    target.draft.put(target.name, part)


def _without(target: Target, part: LowRank, subtract: starts.Taken, weight: torch.Tensor) -> LowRank:
    """The same change of a weight [rows, columns] out of which its start is taken first."""
    down, up = subtract(weight, part.a.shape[0], part.scale)
    if ties.group(target):  # PEFT takes it out in place, so that all that is tied changes
        ties.replace(target, weight - up @ down)
        return part
    return LowRank(torch.cat((part.a.float(), down)), torch.cat((part.scale * part.b.float(), -up), 1), 1.0)


_TRAINING = {"velora_config": "lora_velora_embed", "monteclora_config": "lora_monteclora_sampler"}
"""Options that act in training alone, and what they leave in the checkpoint."""


def _leave_out_training(target: Target) -> None:
    for key, part in _TRAINING.items():
        if target.checkpoint.config.get(key):
            name = f"{target.name}.{part}"
            for left in (name, *target.checkpoint.below(name)):
                if target.checkpoint.has(left):
                    target.checkpoint.drop(left)


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
