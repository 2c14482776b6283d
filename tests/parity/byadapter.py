"""Adapters in AdapterHub's layout, of random numbers, and applied by hand at the ends of sublayers, in an order."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INNER = 8


@dataclass(frozen=True)
class End:
    """A feed-forward's end in a layer: what gets r (and as which argument), what gives h, and the norm behind, if any.

    `attention`: what gives an attention's h.
    """

    stream: str
    argument: int
    given: str
    norm: str
    attention: str


ENDS: Mapping[str, tuple[str, End]] = {
    "bert": (
        r"encoder.layer.{}",
        End("output", 1, "output.dense", "output.LayerNorm", "attention.output.dense"),
    ),
    "gpt2": (r"transformer.h.{}", End("ln_2", 0, "mlp", "", "attn.c_proj")),
    "llama": (r"model.layers.{}", End("post_attention_layernorm", 0, "mlp", "", "self_attn.o_proj")),
    "t5": (
        r"{}",
        End("layer.{}.layer_norm", 0, "layer.{}.DenseReluDense", "", "layer.0.SelfAttention.o"),
    ),
}
PLACES: Mapping[str, tuple[str, str]] = {
    "bert": ("attention.output", "output"),
    "gpt2": ("attention_adapters", "output_adapters"),
    "llama": ("attention_adapters", "output_adapters"),
    "t5": ("layer.0", "layer.{}"),
}
"""Where the library's names of adapters stand below a layer, of attention and feed-forward."""

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "houlsby": {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish"},
    "pfeiffer": {"output_adapter": True, "non_linearity": "relu", "original_ln_before": True},
    "parallel": {"output_adapter": True, "non_linearity": "relu", "is_parallel": True, "scaling": 2.0},
}
_ACT = {"swish": torch.nn.functional.silu, "relu": torch.relu}


def layers(family: str) -> list[tuple[str, int]]:
    """Names of layers as PLACES and ENDS go on from, and the number of the feed-forward (T5)."""
    if family == "t5":
        return [(f"{stack}.block.{i}", last) for stack, last in (("encoder", 1), ("decoder", 2)) for i in range(3)]
    return [(ENDS[family][0].format(i), 0) for i in range(3)]


def written(name: str, family: str, width: int, folder: Path) -> None:
    """A checkpoint `folder / name`."""
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    config = CONFIGS[name]
    tensors = {}
    for layer, last in layers(family):
        for place, wanted in zip(PLACES[family], (config.get("mh_adapter"), True), strict=True):
            start = f"{layer}.{place.format(last)}.adapters.{name}"
            for word, shape in (("adapter_down.0", (INNER, width)), ("adapter_up", (width, INNER))):
                if wanted:
                    noise = torch.randn(shape, generator=random)
                    tensors[f"{start}.{word}.weight"] = 0.7 * noise * shape[1] ** -0.5
                    tensors[f"{start}.{word}.bias"] = 0.2 * torch.randn(shape[0], generator=random)
    (folder / name).mkdir()
    save_file(tensors, folder / name / "adapter.safetensors")
    told = {"config": {**config, "reduction_factor": width / INNER}, "name": name, "version": "adapters.1.3.0"}
    told |= {"model_type": family, "hidden_size": width}
    (folder / name / "adapter_config.json").write_text(json.dumps(told))


Adapt = Callable[[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]
"""Of h, r and what stands behind their sum to what takes the place of h."""


class Ends:
    """The ends of a model's sublayers, at which adapters of several members act in turn."""

    def __init__(self, family: str, model: torch.nn.Module) -> None:
        self._family, self._model = family, model
        self._chains: defaultdict[str, list[Adapt]] = defaultdict(list)

    def add(self, folder: Path, weight: float) -> None:
        name = folder.name
        found, config = load_file(folder / "adapter.safetensors"), CONFIGS[name]
        end = ENDS[self._family][1]
        for layer, last in layers(self._family):
            for place, given in zip(PLACES[self._family], (end.attention, end.given), strict=True):
                start = f"{layer}.{place.format(last)}.adapters.{name}"
                if f"{start}.adapter_up.weight" in found:
                    parts = [
                        found[f"{start}.{w}"]
                        for w in (
                            "adapter_down.0.weight",
                            "adapter_down.0.bias",
                            "adapter_up.weight",
                            "adapter_up.bias",
                        )
                    ]
                    self._chains[f"{layer}.{given.format(last)}"].append(_adapt(name, config, parts, weight))

    def hook(self) -> None:
        """Puts all that was added at its places."""
        end = ENDS[self._family][1]
        for layer, last in layers(self._family):
            streams: list[torch.Tensor] = []
            norm = self._model.get_submodule(f"{layer}.{end.norm}") if end.norm else lambda y: y
            stream = self._model.get_submodule(f"{layer}.{end.stream.format(last)}")
            stream.register_forward_pre_hook(lambda _, given, kept=streams: kept.append(given[end.argument]))
            for given in (end.attention, end.given.format(last)):
                chain = self._chains.get(f"{layer}.{given}", [])
                self._model.get_submodule(f"{layer}.{given}").register_forward_hook(_hook(chain, streams, norm))


def _hook(chain: list[Adapt], streams: list[torch.Tensor], norm: Any) -> Any:
    def hook(_: Any, __: Any, h: torch.Tensor) -> torch.Tensor:
        for adapt in chain:
            h = adapt(h, streams[-1] if streams else h, norm)
        return h

    return hook


def _adapt(name: str, config: Mapping[str, Any], parts: list[torch.Tensor], weight: float) -> Adapt:
    down, down_bias, up, up_bias = parts
    act = _ACT[config["non_linearity"]]

    def z(u: torch.Tensor) -> torch.Tensor:
        return weight * config.get("scaling", 1.0) * (act(u @ down.T + down_bias) @ up.T + up_bias)

    match name:
        case "houlsby":
            return lambda h, r, norm: h + z(h)
        case "pfeiffer":
            return lambda h, r, norm: h + z(norm(h + r))
    return lambda h, r, norm: h + z(r)
