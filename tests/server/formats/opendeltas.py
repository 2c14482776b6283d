"""OpenDelta's layout, written down once more: small checkpoints of every method on the tiny backbones."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta
from deltaserve.errors import BadCheckpoint, DeltaserveError
from deltaserve.formats.registry import Wanted, read

HIDDEN, LAYERS = 16, 2
Tensors = dict[str, torch.Tensor]

START = {"bert": "bert.", "gpt2": "transformer.", "opt": "model.", "t5": ""}
CLASS = {"bert": "BertModel", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "t5": "T5ForConditionalGeneration"}
ENDS: Mapping[str, tuple[str, ...]] = {
    "bert": tuple(f"encoder.layer.{i}.{at}.dense" for i in range(LAYERS) for at in ("attention.output", "output")),
    "gpt2": tuple(f"h.{i}.{at}.c_proj" for i in range(LAYERS) for at in ("attn", "mlp")),
    "opt": ("decoder.layers.0.self_attn.out_proj", "decoder.layers.0.fc2"),
    "t5": tuple(
        f"{stack}.block.{i}.layer.{at}"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for i in range(LAYERS)
        for at in ("0.SelfAttention.o", f"{last}.DenseReluDense.wo")
    ),
}
"""Where the library puts adapters by itself, in the order of the model: names of the base model."""
ATTENTIONS: Mapping[str, tuple[str, ...]] = {
    "bert": tuple(f"encoder.layer.{i}.attention" for i in range(LAYERS)),
    "gpt2": tuple(f"h.{i}.attn" for i in range(LAYERS)),
    "t5": tuple(f"{stack}.block.{i}.layer.0.SelfAttention" for stack in ("encoder", "decoder") for i in range(LAYERS)),
}
PARALLEL: Mapping[str, tuple[str, ...]] = {
    "bert": tuple(f"encoder.layer.{i}.{at}" for i in range(LAYERS) for at in ("attention", "intermediate.dense")),
    "gpt2": tuple(f"h.{i}.{at}" for i in range(LAYERS) for at in ("attn", "mlp.c_fc")),
    "t5": tuple(
        f"{stack}.block.{i}.layer.{at}"
        for stack, last in (("encoder", 1), ("decoder", 2))
        for i in range(LAYERS)
        for at in ("0", f"{last}.DenseReluDense.wi")
    ),
}
LINEARS: Mapping[str, tuple[str, ...]] = {
    "bert": tuple(f"encoder.layer.{i}.attention.self.{at}" for i in range(LAYERS) for at in ("query", "value")),
    "opt": tuple(f"decoder.layers.0.self_attn.{at}_proj" for at in "qv"),
}


class Draw:
    """Random numbers, the same for the same seed."""

    def __init__(self, seed: int = 7) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random) * 0.5

    def linear(self, at: str, inputs: int, outputs: int) -> Tensors:
        return {f"{at}.weight": self(outputs, inputs), f"{at}.bias": self(outputs)}


def adapter(at: str, draw: Draw, inner: int = 3, word: str = "adapter") -> Tensors:
    start = f"{at}.{word}.modulelist"
    return draw.linear(f"{start}.down_proj", HIDDEN, inner) | draw.linear(f"{start}.up_proj", inner, HIDDEN)


def compacter(at: str, draw: Draw, n: int = 2, inner: int = 4, rank: int = 1, **told: bool) -> Tensors:
    found: Tensors = {}
    for name, rows, columns in (("down", HIDDEN, inner), ("up", inner, HIDDEN)):
        start = f"{at}.compactor.{name}_sampler."
        if told.get("factorized_phm_rule"):
            found |= {f"{start}phm_rule_left": draw(n, n, 1), f"{start}phm_rule_right": draw(n, 1, n)}
        else:
            found[f"{start}phm_rule"] = draw(n, n, n)
        if told.get("factorized_phm", True):
            found |= {f"{start}W_left": draw(n, rows // n, rank), f"{start}W_right": draw(n, rank, columns // n)}
        else:
            found[f"{start}W"] = draw(n, rows // n, columns // n)
        if told.get(f"use_bias_{name}_sampler", True):
            found[f"{start}b"] = draw(columns)
    return found


def low_rank(at: str, draw: Draw, inner: int = 4) -> Tensors:
    found: Tensors = {}
    for name, rows, columns in (("down", HIDDEN, inner), ("up", inner, HIDDEN)):
        start = f"{at}.low_rank_adapter.{name}_sampler."
        found |= {f"{start}W_left": draw(rows, 1), f"{start}W_right": draw(1, columns), f"{start}b": draw(columns)}
    return found


def lora(at: str, draw: Draw, rank: int = 3) -> Tensors:
    return {f"{at}.lora.lora_A": draw(rank, HIDDEN), f"{at}.lora.lora_B": draw(HIDDEN, rank)}


def flat(at: str, draw: Draw, rows: int = 3) -> Tensors:
    return {f"{at}.prefix.past_{part}": draw(rows, HIDDEN) for part in ("key", "value")}


def table(at: str, draw: Draw, attentions: int, rows: int = 3) -> Tensors:
    start = f"{at}.reparams"
    found = {f"{start}.wte.weight": draw(rows, 5)} | draw.linear(f"{start}.control_trans.0", 5, 4)
    return found | draw.linear(f"{start}.control_trans.2", 4, 2 * attentions * HIDDEN)


@dataclass
class Made:
    """One checkpoint. Names of its tensors are the base model's; a key of the config that is ... is left out."""

    config: dict[str, Any]
    tensors: Tensors
    family: str = "bert"
    bare: bool = False
    pickled: bool = False
    whole: Tensors = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        known = {"backbone_class": CLASS[self.family], "backbone_hash": "0" * 32, "opendelta_version": "0.3.0"}
        known |= {"exclude_modules": ["lm_head"], "common_structure": True, "transformers_version": "4.33.3"}
        told = {key: value for key, value in (known | self.config).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(told))
        start = "" if self.bare else START[self.family]
        found = {name if name.startswith("soft_") else start + name: t for name, t in self.tensors.items()} | self.whole
        if self.pickled:
            torch.save(found, folder / "pytorch_model.bin")
        else:
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in found.items()}, folder / "model.safetensors"
            )
        return folder


def everywhere(
    places: Mapping[str, tuple[str, ...]], family: str, make: Callable[..., Tensors], **told: Any
) -> Tensors:
    draw, found = Draw(), Tensors()
    for at in places[family]:
        found |= make(at, draw, **told)
    return found


ADAPTER: Mapping[str, Any] = {
    "delta_type": "adapter",
    "bottleneck_dim": 3,
    "non_linearity": "gelu_new",
    "modified_modules": ["attn@.proj@", "ff@.w2@"],
}
COMPACTER: Mapping[str, Any] = {
    "delta_type": "compacter",
    "reduction_factor": 4,
    "hypercomplex_division": 2,
    "phm_rank": 1,
    "non_linearity": "relu",
    "modified_modules": ["attn@.proj@", "ff@.w2@"],
}
LOW_RANK: Mapping[str, Any] = {"delta_type": "low_rank_adapter", "reduction_factor": 4, "low_rank_rank": 1}
LORA: Mapping[str, Any] = {
    "delta_type": "lora",
    "lora_r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.1,
    "modified_modules": ["attn@.q@", "attn@.v@"],
}
PAIRS: Mapping[str, Any] = {
    "delta_type": "parallel_adapter",
    "bottleneck_dim": 3,
    "non_linearity": "tanh",
    "modified_modules": ["attn@", "attn@", "ff@.w1@", "ff@.w2@"],
}
PREFIX: Mapping[str, Any] = {
    "delta_type": "prefix",
    "prefix_token_num": 3,
    "reparameterize": False,
    "embed_dim": 5,
    "mid_dim": 4,
    "modified_modules": ["attn@"],
}
PROMPT: Mapping[str, Any] = {"delta_type": "soft_prompt", "soft_token_num": 3, "modified_modules": ["root"]}
BITFIT: Mapping[str, Any] = {"delta_type": "bitfit"}


def biases(backbone: Backbone) -> Tensors:
    """Every bias of attention, feed-forward and their norms, a little moved; names of the base model."""
    draw, spec = Draw(), backbone.spec
    return {
        f"{name.removeprefix(spec.prefix + '.')}.bias": site.bias + 0.1 * draw(site.out_features)
        for name, site in spec.sites.items()
        if site.bias is not None and (".layer." in name or ".h." in name or ".layers." in name or "ln_f" in name)
    }


def all_made(backbones: Mapping[str, Backbone]) -> Iterator[tuple[str, Made]]:
    """One or more of every method, on every kind of family."""
    for family in ("bert", "gpt2", "t5", "opt"):
        yield f"adapter-{family}", Made(dict(ADAPTER), everywhere(ENDS, family, adapter), family)
        yield f"compacter-{family}", Made(dict(COMPACTER), everywhere(ENDS, family, compacter), family)
        yield f"low-rank-{family}", Made(dict(LOW_RANK), everywhere(ENDS, family, low_rank), family)
        root = "encoder." if family == "t5" else ""
        rows = {f"{root}soft_prompt_layer.soft_embeds": Draw()(3, HIDDEN)}
        yield f"prompt-{family}", Made(dict(PROMPT), rows, family)
        if family in PARALLEL:
            parallel = everywhere(PARALLEL, family, adapter, word="parallel_adapter")
            yield f"parallel-{family}", Made(dict(PAIRS), parallel, family)
            yield f"prefix-{family}", Made(dict(PREFIX), everywhere(ATTENTIONS, family, flat), family)
            first = ATTENTIONS[family][0].removesuffix(".SelfAttention")
            made = table(first, Draw(), len(ATTENTIONS[family]))
            yield f"table-{family}", Made(PREFIX | {"reparameterize": True}, made, family)
        if family in LINEARS:
            yield f"lora-{family}", Made(dict(LORA), everywhere(LINEARS, family, lora), family)
        if family != "t5":
            yield f"bitfit-{family}", Made(dict(BITFIT), biases(backbones[family]), family)


@dataclass(frozen=True)
class Reading:
    """Writes and reads checkpoints on the tiny backbones."""

    backbones: Mapping[str, Backbone]
    folder: Path

    def __call__(self, made: Made, wanted: Wanted = Wanted(), **told: Any) -> Delta:  # noqa: B008
        place = made.write(self.folder / f"{len(list(self.folder.iterdir()))}")
        backbone = self.backbones[made.family]
        return read(place, backbone.spec, backbone.weights, wanted, **told)

    def refused(
        self,
        made: Made,
        *said: str,
        error: type[DeltaserveError] = BadCheckpoint,
        wanted: Wanted = Wanted(),  # noqa: B008
    ) -> None:
        with pytest.raises(error) as caught:
            self(made, wanted)
        assert all(word in caught.value.message for word in said), caught.value.message


def only(delta: Delta, site: str) -> Any:
    """The one primitive at a site."""
    (part,) = delta.at[site]
    return part
