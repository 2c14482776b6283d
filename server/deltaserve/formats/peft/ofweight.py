"""Methods whose change is made out of W itself by learned matrices: DEFT, PEANuT, GLoRA."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

from deltaserve.deltas.primitives import Affine, Dense, LowRank
from deltaserve.deltas.sites import Weights
from deltaserve.formats.draft import Draft
from deltaserve.formats.peft import options
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.options import TARGETED, TRAINED
from deltaserve.formats.peft.targets import Target, each, other_biases

DEFT_OPTIONS = options.Options(
    used=TARGETED | {"r", "decomposition_method", "alpha", "para", "bias"},
    inert=TRAINED | {"init_scale", "deft_dropout"},
)
PEANUT_OPTIONS = options.Options(used=TARGETED | {"r", "depth", "act_fn", "scaling"}, inert=TRAINED)
GLORA_OPTIONS = options.Options(
    used=TARGETED | {"r", "config_A_B", "config_C", "config_D_E", "bias"},
    inert=TRAINED,
)


def deft(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = P (s R − relu(P)ᵀ W), or with `qr` Q (s R − Qᵀ W), Q of P = Q T; `para` leaves R out. s = alpha / r."""
    config = checkpoint.config
    rank = options.integer(config, "r", 8)
    orthogonal = options.choice(config, "decomposition_method", ("relu", "qr")) == "qr"
    alpha = options.number(config, "alpha", 0) if config.get("alpha") else None
    removes = options.flag(config, "para")

    def one(target: Target, weights: Weights) -> None:
        r = min(rank, target.outputs)
        p = target.number("deft_P", target.outputs, r)
        if orthogonal:
            p = right = torch.linalg.qr(p)[0]
        else:
            right = p.relu()
        a = -right.T @ weights(target.name)
        if not removes:
            a = a + (1.0 if alpha is None else alpha / r) * target.number("deft_R", r, target.inputs)
        draft.put(target.name, LowRank(a, p.contiguous(), 1.0))

    each("deft", one, "deft")(checkpoint, draft, weights)


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "gelu_accurate": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_python": functional.gelu,
    "gelu_python_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "leaky_relu": functional.leaky_relu,
    "linear": torch.clone,
    "hardswish": functional.hardswish,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.5**0.5) / (0.282095 * 2**0.5))),
    "mish": functional.mish,
    "prelu": partial(functional.leaky_relu, negative_slope=0.25),  # PEFT neither trains nor saves the slope
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: functional.relu(x).square(),
    "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""By transformers' names."""


def peanut(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = s B hᵀ, h = f(Wᵀ Aᵀ) through coders [r, r] with shortcuts, all of W. arXiv 2410.01870."""
    config = checkpoint.config
    rank, scaling = options.integer(config, "r", 32), options.number(config, "scaling", 1.0)
    depth = options.integer(config, "depth", most=64) if config.get("depth") else 0
    named = config.get("act_fn", "relu")
    act = ACTIVATIONS.get(named) if isinstance(named, str) else None
    if act is None:
        known = ", ".join(ACTIVATIONS)
        raise options.not_served("act_fn", named, f"it is none of transformers' functions without numbers: {known}")

    def one(target: Target, weights: Weights) -> None:
        h = act(weights(target.name).T @ target.number("peanut_A.weight", rank, target.outputs).T)
        before = []
        for k in range(depth):
            before.append(h)
            h = act(h @ target.number(f"peanut_encoders.{k}.weight", rank, rank).T)
        for k in range(depth):
            h = act(h @ target.number(f"peanut_decoders.{k}.weight", rank, rank).T) + before.pop()
        b = target.take("peanut_B.weight", target.outputs, rank)
        draft.put(target.name, LowRank(h.T.contiguous(), b, scaling))

    each("peanut", one)(checkpoint, draft, weights)


_LEAST_SCALE = 1e-3
"""Below it an output's scale cannot be divided by and multiplied with again."""


def glora(checkpoint: Checkpoint, draft: Draft, weights: Weights) -> None:
    """ΔW = W ⊙ A + B and Δb = b ⊙ D + E + W C; without a bias C, D and E do nothing. arXiv 2306.07967.

    Where the biases are trained too, b is the checkpoint's.

    A and B are products of rank r, or a number for each output, or one number: then an Affine does it.
    """
    config = checkpoint.config
    rank = options.integer(config, "r", 8)
    of_weight = options.choice(config, "config_A_B", ("lora", "vector", "constant", "none"))
    of_inputs = options.choice(config, "config_C", ("lora", "vector", "none"))
    of_bias = options.choice(config, "config_D_E", ("constant", "vector", "none"))
    trained = options.choice(config, "bias", ("none", "all", "glora_only"))

    def one(target: Target, weights: Weights) -> None:
        weight, bias = weights(target.name), target.site.bias
        shapes = {"lora": weight.shape, "vector": (target.outputs, 1), "constant": (1,), "none": weight.shape}
        a, b = (_path(target, f"glora_{x}", of_weight, shapes[of_weight], rank) for x in "AB")
        if bias is None:
            for letter, shape in (("C", (target.inputs, 1)), ("D", (target.outputs,)), ("E", (target.outputs,))):
                _path(target, f"glora_{letter}", "none", shape, rank)
            more = None
        else:
            c = _path(target, "glora_C", of_inputs, (target.inputs, 1), rank)
            width = 1 if of_bias == "constant" else target.outputs
            d, e = (_path(target, f"glora_{letter}", of_bias, (width,), rank) for letter in "DE")
            own = bias if trained == "none" else target.number("base_layer.bias", target.outputs)
            more = own - bias + own * d + e + (weight @ c).squeeze(1)
        scale = (1 + a).expand(target.outputs, 1).flatten() if of_weight in ("vector", "constant") else None
        if scale is None or float(scale.abs().min()) < _LEAST_SCALE:
            if bool(a.any()) or bool(b.any()):
                draft.put(target.name, Dense(weight * a + b))
        else:
            each_input = (b.expand(target.outputs, 1) / scale.unsqueeze(1)).contiguous()
            draft.put(target.name, LowRank(draft.base(torch.ones(1, target.inputs)), each_input, 1.0))
            draft.put(target.name, Affine(scale=scale, shift=None if bias is None else (1 - scale) * bias))
        if more is not None:
            draft.shift(target.name, more)

    each("glora", one)(checkpoint, draft, weights)
    if trained != "none":
        draft.kind("bias")
    if trained == "all":
        other_biases(checkpoint, draft)


def _path(target: Target, part: str, kind: str, shape: tuple[int, ...], rank: int) -> torch.Tensor:
    """One of GLoRA's A to E: a product, a vector or a number, or what stands for nothing and is added all the same."""
    if kind == "lora":
        return target.number(f"{part}.Xd", shape[0], rank) @ target.number(f"{part}.Xu", rank, shape[1])
    return target.number(f"{part}.{'zeros' if kind == 'none' else 'X'}", *shape)
