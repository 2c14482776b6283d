"""OpenDelta's checkpoints: what each method's numbers come to, and where in the backbone they stand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from opendeltas import (
    ADAPTER,
    ATTENTIONS,
    BITFIT,
    COMPACTER,
    ENDS,
    HIDDEN,
    LINEARS,
    LORA,
    LOW_RANK,
    PAIRS,
    PARALLEL,
    PREFIX,
    PROMPT,
    START,
    Draw,
    Made,
    Reading,
    Tensors,
    adapter,
    biases,
    compacter,
    everywhere,
    flat,
    lora,
    low_rank,
    only,
    table,
)

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Bottleneck, Tap
from deltaserve.deltas.primitives import Affine, LowRank, Prefix
from deltaserve_kernels.activations import activated
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-6


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def network(part: Bottleneck, x: torch.Tensor) -> torch.Tensor:
    z = x @ part.down.T + (0 if part.down_bias is None else part.down_bias)
    z = activated(z, part.activation) @ part.up.T
    return z + (0 if part.up_bias is None else part.up_bias)


def below(made: Made, start: str) -> Tensors:
    return {name.removeprefix(start): t for name, t in made.tensors.items() if name.startswith(start)}


def rows(width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(6, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize(
    ("word", "function"),
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_orig", "gelu"),
        ("swish", "silu"),
        ("LeakyReLU", "leaky_relu"),
        ("relu", "relu"),
    ],
)
def test_adapters(reading: Reading, family: str, word: str, function: str) -> None:
    made = Made(ADAPTER | {"non_linearity": word}, everywhere(ENDS, family, adapter), family)
    delta = reading(made)
    assert delta.kinds == ("adapter",) and set(delta.at) == {START[family] + at for at in ENDS[family]}
    for at in ENDS[family]:
        part = only(delta, START[family] + at)
        assert (part.input, part.carry, part.replaces) == (Tap.OUTPUT, Tap.OUTPUT, False)
        held = {
            n.removeprefix(f"{at}.adapter.modulelist."): t for n, t in made.tensors.items() if n.startswith(f"{at}.")
        }
        x = rows()
        z = activated(x @ held["down_proj.weight"].T + held["down_proj.bias"], function)
        wanted = z @ held["up_proj.weight"].T + held["up_proj.bias"]
        assert error_ratio(network(part, x), wanted) < EXACT


@pytest.mark.parametrize(
    ("told", "changed"),
    [
        ({}, {}),
        ({"factorized_phm_rule": True}, {}),
        ({"factorized_phm": False}, {}),
        ({"phm_rank": 3, "hypercomplex_division": 4}, {"n": 4, "rank": 3}),
        ({"use_bias_down_sampler": False, "use_bias_up_sampler": False}, {}),
    ],
)
def test_compacters(reading: Reading, told: dict[str, Any], changed: dict[str, Any]) -> None:
    """y' = y + up(f(down(y))), each weight a sum of Kronecker products of its own rule."""
    flags = {key: value for key, value in told.items() if isinstance(value, bool)}
    made = Made(COMPACTER | told, everywhere(ENDS, "bert", compacter, **changed, **flags))
    delta = reading(made)
    assert delta.kinds == ("compacter",)
    for at in ENDS["bert"]:

        def linear(x: torch.Tensor, start: str) -> torch.Tensor:
            def held(name: str) -> torch.Tensor:
                return made.tensors[start + name].double()

            rule = (
                held("phm_rule_left") @ held("phm_rule_right") if flags.get("factorized_phm_rule") else held("phm_rule")
            )
            weight = held("W_left") @ held("W_right") if flags.get("factorized_phm", True) else held("W")
            whole = torch.stack([torch.kron(a, w) for a, w in zip(rule, weight, strict=True)]).sum(0)
            bias = made.tensors.get(f"{start}b")
            return x.double() @ whole + (0 if bias is None else bias.double())

        x = rows()
        middle = torch.relu(linear(x, f"{at}.compactor.down_sampler."))
        wanted = linear(middle, f"{at}.compactor.up_sampler.")
        assert error_ratio(network(only(delta, f"bert.{at}"), x), wanted) < EXACT


def test_low_rank_adapters(reading: Reading) -> None:
    made = Made(dict(LOW_RANK), everywhere(ENDS, "bert", low_rank))
    delta = reading(made)
    assert delta.kinds == ("low-rank-adapter",)
    for at in ENDS["bert"]:
        held = below(made, f"{at}.low_rank_adapter.")

        def linear(x: torch.Tensor, name: str, held: Tensors = held) -> torch.Tensor:
            return x @ (held[f"{name}_sampler.W_left"] * held[f"{name}_sampler.W_right"]) + held[f"{name}_sampler.b"]

        x = rows()
        wanted = linear(activated(linear(x, "down"), "gelu_tanh"), "up")
        assert error_ratio(network(only(delta, f"bert.{at}"), x), wanted) < EXACT


def test_lora(reading: Reading) -> None:
    made = Made(dict(LORA), everywhere(LINEARS, "bert", lora))
    delta = reading(made)
    assert delta.kinds == ("lora",) and len(delta.at) == 4
    for at in LINEARS["bert"]:
        part = only(delta, f"bert.{at}")
        assert isinstance(part, LowRank) and part.scale == 5 / 3
        assert torch.equal(part.a, made.tensors[f"{at}.lora.lora_A"])
        assert torch.equal(part.b, made.tensors[f"{at}.lora.lora_B"])


AROUND: Mapping[str, Mapping[str, tuple[str, Tap, Tap]]] = {
    "bert": {
        "attention": ("attention.output.dense", Tap.RESIDUAL, Tap.NORMED),
        "intermediate.dense": ("output.dense", Tap.INPUT, Tap.OUTPUT),
    },
    "gpt2": {"attn": ("attn.c_proj", Tap.INPUT, Tap.OUTPUT), "mlp.c_fc": ("mlp.c_proj", Tap.INPUT, Tap.OUTPUT)},
    "t5": {
        "layer.0": ("layer.0.SelfAttention.o", Tap.RESIDUAL, Tap.SUM),
        "layer.1.DenseReluDense.wi": ("layer.1.DenseReluDense.wo", Tap.INPUT, Tap.OUTPUT),
        "layer.2.DenseReluDense.wi": ("layer.2.DenseReluDense.wo", Tap.INPUT, Tap.OUTPUT),
    },
}


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_adapters(reading: Reading, family: str) -> None:
    """From what a block gets to what it gives, which in BERT is behind its norm, in T5 behind the residual."""
    made = Made(dict(PAIRS), everywhere(PARALLEL, family, adapter, word="parallel_adapter"), family)
    delta = reading(made)
    assert delta.kinds == ("parallel-adapter",) and len(delta.at) == len(PARALLEL[family])
    for at in PARALLEL[family]:
        end, (site, tap, carry) = next((e, where) for e, where in AROUND[family].items() if at.endswith("." + e))
        part = only(delta, START[family] + at.removesuffix(end) + site)
        assert (part.input, part.carry, part.replaces) == (tap, carry, carry is not Tap.OUTPUT)
        assert torch.equal(part.up, made.tensors[f"{at}.parallel_adapter.modulelist.up_proj.weight"])


SITES: Mapping[str, tuple[tuple[str, str, Tap], ...]] = {
    "bert": (
        ("encoder.layer.1", "output.dense", Tap.NORMED),
        ("encoder.layer.1.attention", "attention.output.dense", Tap.NORMED),
        ("encoder.layer.1.attention.output", "attention.output.dense", Tap.NORMED),
        ("encoder.layer.1.attention.output.LayerNorm", "attention.output.dense", Tap.NORMED),
        ("encoder.layer.1.output", "output.dense", Tap.NORMED),
        ("encoder.layer.1.attention.self.key", "attention.self.key", Tap.OUTPUT),
    ),
    "gpt2": (
        ("h.1", "mlp.c_proj", Tap.SUM),
        ("h.1.attn", "attn.c_proj", Tap.OUTPUT),
        ("h.1.mlp", "mlp.c_proj", Tap.OUTPUT),
        ("h.1.ln_2", "ln_2", Tap.OUTPUT),
    ),
    "t5": (
        ("decoder.block.1", "layer.2.DenseReluDense.wo", Tap.SUM),
        ("encoder.final_layer_norm", "final_layer_norm", Tap.OUTPUT),
        ("decoder.block.1.layer.1", "layer.1.EncDecAttention.o", Tap.SUM),
        ("decoder.block.1.layer.1.EncDecAttention", "layer.1.EncDecAttention.o", Tap.OUTPUT),
        ("decoder.block.1.layer.2.DenseReluDense", "layer.2.DenseReluDense.wo", Tap.OUTPUT),
    ),
    "opt": (("decoder.layers.0", "fc2", Tap.SUM), ("decoder.layers.0.self_attn", "self_attn.out_proj", Tap.OUTPUT)),
}


@pytest.mark.parametrize(("family", "at", "site", "tap"), [(f, *row) for f, rows in SITES.items() for row in rows])
def test_an_adapter_on_any_module(reading: Reading, family: str, at: str, site: str, tap: Tap) -> None:
    config = ADAPTER | {"modified_modules": [at], "common_structure": False}
    (found,) = reading(Made(config, adapter(at, Draw()), family)).at.items()
    assert found[0].startswith(START[family]) and found[0].endswith("." + site)
    assert (found[1][0].input, found[1][0].carry, found[1][0].replaces) == (tap, tap, tap is not Tap.OUTPUT)


@pytest.mark.parametrize(
    ("at", "fed"), [("intermediate", "output.dense"), ("attention.self", "attention.output.dense")]
)
def test_an_adapter_on_what_a_linear_gets(reading: Reading, at: str, fed: str) -> None:
    """W (x + A(x)) + b = h + W A(x)."""
    module, site = f"encoder.layer.0.{at}", f"bert.encoder.layer.0.{fed}"
    backbone, draw = reading.backbones["bert"], Draw()
    width = backbone.spec.sites[site].in_features
    start = f"{module}.adapter.modulelist"
    tensors = draw.linear(f"{start}.down_proj", width, 3) | draw.linear(f"{start}.up_proj", 3, width)
    part = only(reading(Made(ADAPTER | {"modified_modules": [module], "common_structure": False}, tensors)), site)
    assert (part.input, part.carry) == (Tap.OWN, Tap.OUTPUT)
    x = rows(width)
    z = activated(x @ tensors[f"{start}.down_proj.weight"].T + tensors[f"{start}.down_proj.bias"], "gelu_tanh")
    wanted = (z @ tensors[f"{start}.up_proj.weight"].T + tensors[f"{start}.up_proj.bias"]) @ backbone.weights(site).T
    assert error_ratio(network(part, x), wanted) < EXACT


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_prefixes(reading: Reading, family: str) -> None:
    made = Made(dict(PREFIX), everywhere(ATTENTIONS, family, flat), family)
    delta = reading(made)
    assert delta.kinds == ("prefix-tuning",) and delta.position_shift == 0
    for at, site in zip(ATTENTIONS[family], reading.backbones[family].spec.prefix_sites, strict=True):
        part = only(delta, site)
        assert (part.pre, part.tok, part.biased) == (0, 0, True)
        for name, held in (("key", part.keys), ("value", part.values)):
            assert torch.equal(held, made.tensors[f"{at}.prefix.past_{name}"].view(3, 2, 8))


@pytest.mark.parametrize("family", ATTENTIONS)
def test_a_table_of_prefixes(reading: Reading, family: str) -> None:
    """kv = Linear(tanh(Linear(wte))), cut by attentions in the order of the model, keys before values."""
    attentions = ATTENTIONS[family]
    first = attentions[0].removesuffix(".SelfAttention")
    made = Made(PREFIX | {"reparameterize": True}, table(first, Draw(), len(attentions)), family)
    delta = reading(made)
    held = {n.removeprefix(f"{first}.reparams."): t.double() for n, t in made.tensors.items()}
    hidden = torch.tanh(held["wte.weight"] @ held["control_trans.0.weight"].T + held["control_trans.0.bias"])
    pairs = (hidden @ held["control_trans.2.weight"].T + held["control_trans.2.bias"]).view(
        3, len(attentions), 2, HIDDEN
    )
    for number, at in enumerate(attentions):
        part = only(delta, START[family] + at + (".self" if family == "bert" else ""))
        assert error_ratio(part.keys.flatten(1), pairs[:, number, 0]) < EXACT
        assert error_ratio(part.values.flatten(1), pairs[:, number, 1]) < EXACT


@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1)])
def test_relative_positions_behind_a_prefix(reading: Reading, chosen: tuple[int, ...]) -> None:
    """The first layer keeps the text's distances; a later one with a prefix, and all behind one, add no bias."""
    names = [f"{stack}.block.{i}.layer.0.SelfAttention" for stack in ("encoder", "decoder") for i in chosen]
    tensors, draw = Tensors(), Draw()
    for name in names:
        tensors |= flat(name, draw)
    config = PREFIX | {"modified_modules": [f"block.{i}.layer.0" for i in chosen], "common_structure": False}
    delta = reading(Made(config, tensors, "t5"))
    for stack in ("encoder", "decoder"):
        for i in range(2):
            parts = delta.at.get(f"{stack}.block.{i}.layer.0.SelfAttention", ())
            if i < min(chosen):
                assert not parts
                continue
            (part,) = parts
            assert isinstance(part, Prefix) and part.biased == (i == 0) and part.tok == 0
            assert len(part.keys) == (3 if i in chosen else 0)
            assert part.pre == (-3 if i in chosen else 0)


@pytest.mark.parametrize("family", START)
def test_soft_prompts(reading: Reading, family: str) -> None:
    name = ("encoder." if family == "t5" else "") + "soft_prompt_layer.soft_embeds"
    made = Made(dict(PROMPT), {name: Draw()(3, HIDDEN)}, family)
    delta = reading(made)
    assert delta.kinds == ("prompt-tuning",) and delta.prompt is not None and delta.prompt.place is None
    assert torch.equal(delta.prompt.rows, made.tensors[name]) and not delta.at


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_bitfit_keeps_values(reading: Reading, family: str) -> None:
    """The file has the bias itself; what acts is the difference from the backbone's."""
    backbone = reading.backbones[family]
    made = Made(dict(BITFIT), biases(backbone), family)
    delta = reading(made)
    assert delta.kinds == ("bitfit",) and len(delta.at) == len(made.tensors)
    for name, value in made.tensors.items():
        site = START[family] + name.removesuffix(".bias")
        part, bias = only(delta, site), backbone.spec.sites[site].bias
        assert isinstance(part, Affine) and part.scale is None and bias is not None and part.shift is not None
        assert torch.equal(part.shift, value - bias)


def test_a_bias_where_there_was_none(reading: Reading) -> None:
    names = ("encoder.block.0.layer.0.layer_norm", "decoder.final_layer_norm")
    config = BITFIT | {"modified_modules": list(names), "common_structure": False}
    made = Made(config, {f"{name}.bitfit.bias": Draw()(HIDDEN) for name in names}, "t5")
    delta = reading(made)
    for name in names:
        assert torch.equal(only(delta, name).shift, made.tensors[f"{name}.bitfit.bias"])
