"""Adapters on the frozen backbone, as modules of our own, and AdapterHub's layout for them on disk.

At a sublayer's end, h being its last linear's output and r the stream that it is added to: Houlsby and Compacter are
h + A(h) behind self-attention and feed-forward; Pfeiffer is y + A(y), y = h + r, and parallel h + A(r), behind
feed-forward.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaserve.demo.tasks import Recipe

VERSION = "adapters.1.3.0"
"""The release of AdapterHub's library whose layout this is."""


class Kronecker(nn.Module):
    """y = x H + b, H = Σ_i rule_i ⊗ (left_i right_i), so many `parts`. Compacter (arXiv 2106.04647), its own rule."""

    def __init__(self, width: int, out: int, parts: int, rank: int = 1) -> None:
        super().__init__()
        self.phm_rule = nn.Parameter(torch.randn(parts, parts, parts) * 0.5)
        self.W_left = nn.Parameter(torch.randn(parts, width // parts, rank) * (parts / width) ** 0.5)
        self.W_right = nn.Parameter(torch.randn(parts, rank, out // parts) * rank**-0.5)
        self.b = nn.Parameter(torch.zeros(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.W_left @ self.W_right
        whole = torch.einsum("iab,icd->acbd", self.phm_rule, small)
        return x @ whole.reshape(x.shape[-1], -1) + self.b


class Adapter(nn.Module):
    """f(x Downᵀ) Upᵀ with biases; up begins at zero, so that training begins at the backbone."""

    def __init__(self, width: int, inner: int, activation: nn.Module, kronecker: int | None) -> None:
        super().__init__()
        if kronecker is None:
            down: nn.Module = nn.Linear(width, inner)
            up: Any = nn.Linear(inner, width)
            nn.init.zeros_(up.weight)
        else:
            down, up = Kronecker(width, inner, kronecker), Kronecker(inner, width, kronecker)
            nn.init.zeros_(up.W_right)
        nn.init.zeros_(up.b if kronecker is not None else up.bias)
        self.adapter_down = nn.Sequential(down, activation)
        self.adapter_up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.adapter_up(self.adapter_down(x))
        assert isinstance(made, torch.Tensor)
        return made


@dataclass(frozen=True)
class Shape:
    """A config of AdapterHub's, as far as it differs from the library's defaults."""

    attention: bool
    activation: type[nn.Module]
    told: Mapping[str, Any]


SHAPES: Mapping[str, Shape] = {
    "houlsby": Shape(True, nn.SiLU, {"non_linearity": "swish"}),
    "pfeiffer": Shape(False, nn.ReLU, {"non_linearity": "relu", "original_ln_before": True}),
    "parallel": Shape(False, nn.ReLU, {"non_linearity": "relu", "is_parallel": True}),
    "compacter": Shape(True, nn.GELU, {"non_linearity": "gelu", "phm_layer": True, "shared_phm_rule": False}),
}


def attach(recipe: Recipe, backbone: Any) -> Any:
    """A copy of the backbone, frozen, with fresh adapters in its modules."""
    model = copy.deepcopy(backbone).requires_grad_(False)
    shape, width = SHAPES[recipe.method], model.config.d_model
    for layer, ends in _sublayers(model, shape.attention):
        adapter = Adapter(
            width,
            width // recipe.options["reduction_factor"],
            shape.activation(),
            recipe.options.get("phm_dim"),
        )
        # The library's name of it, so that a state dict's names are those of its files.
        layer.adapters = nn.ModuleDict({recipe.name: adapter})
        _hook(recipe.method, layer, ends, adapter)
    return model


def save(recipe: Recipe, model: Any, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter.safetensors`, as AdapterHub's `save_adapter` does."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." in name}
    save_file({name: own[name].contiguous() for name in sorted(own)}, folder / "adapter.safetensors")
    config = {
        "config": {**_DEFAULTS, **SHAPES[recipe.method].told, **recipe.options}
        | {"mh_adapter": SHAPES[recipe.method].attention},
        "hidden_size": model.config.d_model,
        "model_class": type(model).__name__,
        "model_name": "",
        "model_type": model.config.model_type,
        "name": recipe.name,
        "version": VERSION,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _sublayers(model: Any, attention: bool) -> Iterator[tuple[Any, nn.Linear]]:
    """Self-attentions, if wanted, and feed-forwards: each with its last linear."""
    for block in (*model.encoder.block, *model.decoder.block):
        if attention:
            yield block.layer[0], block.layer[0].SelfAttention.o
        yield block.layer[-1], block.layer[-1].DenseReluDense.wo


def _hook(method: str, layer: Any, last: nn.Linear, adapter: Adapter) -> None:
    if method == "pfeiffer":
        layer.register_forward_hook(lambda _, __, stream: stream + adapter(stream))
    elif method == "parallel":
        layer.register_forward_hook(lambda _, given, stream: stream + adapter(given[0]))
    else:
        last.register_forward_hook(lambda _, __, h: h + adapter(h))


_DEFAULTS: Mapping[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""All keys of a bottleneck's config."""
