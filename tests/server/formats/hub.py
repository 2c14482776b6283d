"""AdapterHub's layout, written down once more: small checkpoints, and what the words of `deltas` come to."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Adapter, Bottleneck, Fusion, OwnNorm, Tap
from deltaserve.deltas.delta import Delta
from deltaserve.errors import BadCheckpoint, DeltaserveError
from deltaserve.formats.registry import Wanted, read
from deltaserve_kernels.activations import activated

HIDDEN, LAYERS = 16, 2
Tensors = dict[str, torch.Tensor]

SEQ: Mapping[str, Any] = {
    "architecture": None, "mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu",
    "original_ln_before": True, "original_ln_after": True, "residual_before_ln": True, "scaling": 1.0,
}  # fmt: skip
HOULSBY: Mapping[str, Any] = {**SEQ, "mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
PAR: Mapping[str, Any] = {**SEQ, "original_ln_before": False, "is_parallel": True, "scaling": 4.0}
COMPACTER: Mapping[str, Any] = {**SEQ, "phm_layer": True, "phm_dim": 2, "non_linearity": "gelu"}
LORA: Mapping[str, Any] = {
    "architecture": "lora", "selfattn_lora": True, "attn_matrices": ["q", "v"], "r": 3, "alpha": 6,
    "composition_mode": "add",
}  # fmt: skip
PREFIX: Mapping[str, Any] = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3}
REFT: Mapping[str, Any] = {
    "architecture": "reft", "layers": "all", "prefix_positions": 2, "suffix_positions": 0, "r": 2,
    "orthogonality": False,
}  # fmt: skip
PROMPT: Mapping[str, Any] = {"architecture": "prompt_tuning", "prompt_length": 3, "combine": "prefix"}

STARTS = {
    "bert": "bert.",
    "gpt2": "transformer.",
    "t5": "",
    "llama": "model.",
    "gemma2": "model.",
    "modernbert": "model.",
    "opt": "model.",
}
PLACES: Mapping[str, Callable[[int, str], str]] = {
    "bert": lambda i, key: f"encoder.layer.{i}." + ("attention.output" if key == "mh_adapter" else "output"),
    "gpt2": lambda i, key: f"h.{i}." + ("attention_adapters" if key == "mh_adapter" else "output_adapters"),
    "llama": lambda i, key: f"layers.{i}." + ("attention_adapters" if key == "mh_adapter" else "output_adapters"),
    "gemma2": lambda i, key: f"layers.{i}." + ("attention_adapters" if key == "mh_adapter" else "output_adapters"),
    "modernbert": lambda i, key: f"layers.{i}." + ("attention_adapters" if key == "mh_adapter" else "output_adapters"),
    "opt": lambda i, key: f"decoder.layers.{i}."
    + ("attention_adapters" if key == "mh_adapter" else "output_adapters"),
    "t5": lambda i, key: f"encoder.block.{i}.layer." + ("0" if key == "mh_adapter" else "1")
    if i < LAYERS
    else f"decoder.block.{i - LAYERS}.layer." + {"mh_adapter": "0", "cross_adapter": "1", "output_adapter": "2"}[key],
}  # fmt: skip
"""A module by the number of its layer, T5's decoder behind its encoder, and the key that means it."""


@dataclass
class Made:
    """One checkpoint: `told` is its config's `config`, `known` the keys beside it."""

    told: Any
    tensors: Tensors
    family: str = "bert"
    name: str = "a"
    known: dict[str, Any] = field(default_factory=dict)
    pickled: bool = False

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = {"name": self.name, "config": self.told, "model_type": self.family, "hidden_size": HIDDEN}
        config |= {"version": "adapters.1.3.0", **self.known}
        (folder / "adapter_config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )
        start = STARTS[self.family]
        tensors = {start + name: tensor for name, tensor in self.tensors.items()}
        save(tensors, folder, "adapter.safetensors", "pytorch_adapter.bin", self.pickled)
        return folder


def save(tensors: Tensors, folder: Path, safe: str, pickled: str, as_pickle: bool = False) -> None:
    if as_pickle:
        torch.save(tensors, folder / pickled)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / safe)


class Draw:
    """Random numbers, the same for the same seed."""

    def __init__(self, seed: int = 7) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random) * 0.5

    def norm(self, at: str) -> Tensors:
        return {f"{at}.weight": 1 + self(HIDDEN), f"{at}.bias": self(HIDDEN)}

    def linear(self, at: str, inputs: int, outputs: int) -> Tensors:
        return {f"{at}.weight": self(outputs, inputs), f"{at}.bias": self(outputs)}


def layers_of(family: str) -> int:
    return 2 * LAYERS if family == "t5" else 1 if family == "opt" else LAYERS


def keys_of(family: str, layer: int) -> Sequence[str]:
    return ("mh_adapter", "output_adapter", "cross_adapter")[: 3 if family == "t5" and layer >= LAYERS else 2]


def bottlenecks(told: Mapping[str, Any], family: str = "bert", name: str = "a", seed: int = 7) -> Tensors:
    """The tensors of a bottleneck adapter's config."""
    draw, made = Draw(seed), Tensors()
    for layer in range(layers_of(family)):
        for key in keys_of(family, layer):
            if told.get(key) and layer not in told.get("leave_out", ()):
                made |= _bottleneck(told, f"{PLACES[family](layer, key)}.adapters.{name}", layer, draw)
    if told.get("inv_adapter"):
        inner = int(HIDDEN / 2 // told["inv_adapter_reduction_factor"])
        at = ("encoder." if family == "t5" else "") + f"invertible_adapters.{name}"
        for word in "FG":
            made |= draw.linear(f"{at}.{word}.0", HIDDEN // 2, inner) | draw.linear(
                f"{at}.{word}.2", inner, HIDDEN // 2
            )
    return made


def width_of(told: Mapping[str, Any], layer: int) -> int:
    factor = told["reduction_factor"]
    return max(
        1, int(HIDDEN // (factor.get(str(layer), factor.get("default")) if isinstance(factor, dict) else factor))
    )


def _bottleneck(told: Mapping[str, Any], at: str, layer: int, draw: Draw) -> Tensors:
    width, made, down = width_of(told, layer), Tensors(), f"{at}.adapter_down.0"
    if told.get("ln_before"):
        made |= draw.norm(down)
        made |= {f"{at}.adapter_norm_before.{word}": made[f"{down}.{word}"].clone() for word in ("weight", "bias")}
        down = f"{at}.adapter_down.1"
    made |= draw.linear(down, HIDDEN, width) | draw.linear(f"{at}.adapter_up", width, HIDDEN)
    if told.get("ln_after"):
        made |= draw.norm(f"{at}.adapter_norm_after")
    if told.get("use_gating"):
        made |= draw.linear(f"{at}.gate", HIDDEN, 1)
    if isinstance(told["scaling"], str):
        made[f"{at}.scaling"] = 1 + draw(1 if told["scaling"] == "learned" else HIDDEN)
    return made


@dataclass
class Stream:
    """What is known where a sublayer ends: h, r, its own input, and LN, by rows [n, hidden]."""

    h: torch.Tensor
    r: torch.Tensor
    own: torch.Tensor
    ends: Callable[[torch.Tensor], torch.Tensor]
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None

    def tap(self, tap: Tap, h: torch.Tensor) -> torch.Tensor:
        if tap is Tap.NORMED:
            assert self.norm is not None
            return self.norm(h + self.r)
        return {Tap.OUTPUT: h, Tap.RESIDUAL: self.r, Tap.SUM: h + self.r, Tap.OWN: self.own, Tap.INPUT: self.own}[tap]

    def after(self, chain: Sequence[Adapter]) -> torch.Tensor:
        """The stream behind the sublayer, when these adapters act in turn: what the words of `deltas` say."""
        h, replaced = self.h, False
        for adapter in chain:
            h = (_fused if isinstance(adapter, Fusion) else _alone)(adapter, self, h)
            replaced = adapter.replaces
        return h if replaced else self.ends(h)


def _normed(own: OwnNorm | None, x: torch.Tensor) -> torch.Tensor:
    return x if own is None else torch.nn.functional.layer_norm(x, x.shape[-1:], own.weight, own.bias, own.eps)


def _network(one: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    z = activated(torch.nn.functional.linear(_normed(one.before, x), one.down.float(), one.down_bias), one.activation)
    z = one.scale * torch.nn.functional.linear(z, one.up.float())
    return z if one.up_bias is None else z + one.up_bias


def _ended(one: Adapter, z: torch.Tensor, q: torch.Tensor | float) -> torch.Tensor:
    return _normed(one.after, z + q) if one.carry_inside else _normed(one.after, z) + q


def _alone(one: Bottleneck, stream: Stream, h: torch.Tensor) -> torch.Tensor:
    u = stream.tap(one.input, h)
    z = _network(one, u)
    if one.gate is not None:
        z = z * torch.sigmoid(torch.nn.functional.linear(u, one.gate.weight, one.gate.bias)).mean(0)
    return _ended(one, z, 0.0 if one.carry is None else one.carry_scale * stream.tap(one.carry, h))


def _fused(one: Fusion, stream: Stream, h: torch.Tensor) -> torch.Tensor:
    q = 0.0 if one.carry is None else one.carry_scale * stream.tap(one.carry, h)
    t = stream.tap(one.query_tap, h)
    u = torch.stack([_network(member, stream.tap(member.input, h)) for member in one.members], 1)
    if one.members_carry:
        u = u + (q.unsqueeze(1) if isinstance(q, torch.Tensor) else q)
    asked = t if one.query is None else torch.nn.functional.linear(t, one.query, one.query_bias)
    keys = u if one.key is None else torch.nn.functional.linear(u, one.key, one.key_bias)
    p = torch.einsum("nd,nkd->nk", asked, keys).softmax(-1)
    c = torch.einsum("nk,nkd->nd", p, u if one.value is None else u @ one.value.T)
    return _ended(one, c, 0.0 if one.members_carry else q)


@dataclass
class Reading:
    """Reads what was made, for the backbone of its family."""

    backbones: Mapping[str, Backbone]
    place: Path

    def __call__(self, made: "Made | Path", family: str = "bert", wanted: Wanted = Wanted(), **told: Any) -> Delta:  # noqa: B008
        if isinstance(made, Made):
            family = made.family
            folder = made.write(self.place / f"{made.name[:20]}-{len(list(self.place.iterdir()))}")
        else:
            folder = made
        backbone = self.backbones[family]
        return read(
            folder, backbone.spec, backbone.weights, wanted, allow_pickle=told.pop("allow_pickle", True), **told
        )

    def refused(
        self, made: "Made | Path", *said: str, error: type[DeltaserveError] = BadCheckpoint, family: str = "bert",
        wanted: Wanted = Wanted(), **told: Any,  # noqa: B008
    ) -> DeltaserveError:  # fmt: skip
        with pytest.raises(error) as caught:
            self(made, family, wanted, **told)
        assert all(word in caught.value.message for word in said), caught.value.message
        return caught.value


def loaded(folder: Path) -> Tensors:
    return load_file(folder / "adapter.safetensors")
