"""Activations that adapters may have: by the name that primitives carry, what torch computes in fp32."""

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _mish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tanh(functional.softplus(x))


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x).clamp(-10, 10)


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_10": _gelu_10,
    "quick_gelu": _quick_gelu,
    "silu": functional.silu,
    "mish": _mish,
    "laplace": _laplace,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Formats map their libraries' names to these (transformers' `swish` is silu, `gelu_new` is gelu_tanh)."""


_NAMES = (None, *ACTIVATIONS)


def number_of(name: str | None) -> int:
    """What tables and kernels know an activation by: its place in ACTIVATIONS, from 1; 0 for identity."""
    return _NAMES.index(name)


def name_of(number: int) -> str | None:
    return _NAMES[number]


def activated(x: torch.Tensor, name: str | None) -> torch.Tensor:
    """f(x), fp32; identity for None."""
    return x if name is None else ACTIVATIONS[name](x)
