"""AdapterHub's prefixes, ReFT and prompts: what is in a file is what the library computes with."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import HIDDEN, PREFIX, PROMPT, REFT, Draw, Made, Reading, Stream, Tensors
from torch.nn.functional import gelu, leaky_relu, linear

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Bottleneck, Positions, Reach
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Prefix
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
ROWS = 3
ATTENTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "bert": {"self_prefix": tuple(f"bert.encoder.layer.{i}.attention.self" for i in range(2))},
    "gpt2": {"self_prefix": tuple(f"transformer.h.{i}.attn" for i in range(2))},
    "llama": {"self_prefix": tuple(f"model.layers.{i}.self_attn" for i in range(2))},
    "t5": {
        "encoder_prefix": tuple(f"encoder.block.{i}.layer.0.SelfAttention" for i in range(2)),
        "self_prefix": tuple(f"decoder.block.{i}.layer.0.SelfAttention" for i in range(2)),
        "cross_prefix": tuple(f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)),
    },
}
HEADS = {"bert": (2, 8), "gpt2": (2, 8), "llama": (2, 4), "t5": (2, 8)}


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def prefixed(family: str, told: Mapping[str, Any], name: str = "a") -> Tensors:
    """A prefix's tensors, of each group that the config has; below each layer the library writes them again."""
    draw, made = Draw(), Tensors()
    heads, width = HEADS[family]
    number = {site: i for group in ATTENTIONS[family].values() for i, site in enumerate(group)}
    for group, sites in ATTENTIONS[family].items():
        if told.get(group, True) is False:
            continue
        first = 2 if group in ("self_prefix", "cross_prefix") and family == "t5" else 0
        count = sum(number[site] + first not in told.get("leave_out", ()) for site in sites)
        total, at = 2 * count * heads * width, f"prefix_tuning.prefix_tunings.{name}.{group}"
        if told.get("flat"):
            made[f"{at}.control_trans"] = draw(told["prefix_length"] * total)
        else:
            made[f"{at}.wte.weight"] = draw(told["prefix_length"], HIDDEN)
            inner = told["bottleneck_size"]
            made |= draw.linear(f"{at}.control_trans.0", HIDDEN, inner) | draw.linear(
                f"{at}.control_trans.2", inner, total
            )
    again = {
        f"encoder.layer.0.attention.self.prefix_tuning.pool.{n.removeprefix('prefix_tuning.')}": t
        for n, t in made.items()
    }
    return {**made, **again}


def whole(tensors: Tensors, group: str, rows: int, family: str) -> torch.Tensor:
    """[rows, 2 layers, heads, width] as the library makes them."""
    at = f"prefix_tuning.prefix_tunings.a.{group}"
    found = tensors.get(f"{at}.control_trans")
    if found is None:
        x = linear(
            tensors[f"{at}.wte.weight"], tensors[f"{at}.control_trans.0.weight"], tensors[f"{at}.control_trans.0.bias"]
        )
        found = linear(x.tanh(), tensors[f"{at}.control_trans.2.weight"], tensors[f"{at}.control_trans.2.bias"])
    return found.view(rows, -1, *HEADS[family])


def prefix_at(delta: Delta, site: str) -> Prefix:
    (found,) = delta.at[site]
    assert isinstance(found, Prefix)
    return found


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_prefix(family: str, flat: bool, reading: Reading) -> None:
    told = {**PREFIX, "flat": flat, "bottleneck_size": 5}
    made = Made(told, prefixed(family, told), family, pickled=True)
    delta = reading(made)
    assert delta.kinds == ("prefix-tuning",) and delta.position_shift == 0
    for group, sites in ATTENTIONS[family].items():
        wanted = whole(made.tensors, group, ROWS, family)
        for layer, site in enumerate(sites):
            found = prefix_at(delta, site)
            assert error_ratio(found.keys, wanted[:, 2 * layer]) < EXACT
            assert error_ratio(found.values, wanted[:, 2 * layer + 1]) < EXACT
            assert (found.pre, found.tok, found.biased) == (
                (0, ROWS, True) if family == "t5" and group != "cross_prefix" else (0, 0, True)
            )


def test_ejected_prefix_is_known_by_its_tensors(reading: Reading) -> None:
    told = {**PREFIX, "flat": True}
    found = reading(Made({**told, "flat": False}, prefixed("bert", told), pickled=True))
    assert torch.equal(
        prefix_at(found, ATTENTIONS["bert"]["self_prefix"][1]).keys,
        prefix_at(reading(Made(told, prefixed("bert", told), pickled=True)), ATTENTIONS["bert"]["self_prefix"][1]).keys,
    )


def test_layers_left_out_are_not_counted(reading: Reading) -> None:
    told = {**PREFIX, "leave_out": [0]}
    made = Made(told, prefixed("bert", told), pickled=True)
    delta = reading(made)
    assert set(delta.at) == {ATTENTIONS["bert"]["self_prefix"][1]}
    (site,) = delta.at
    assert torch.equal(prefix_at(delta, site).keys, whole(made.tensors, "self_prefix", ROWS, "bert")[:, 0])


Bias = tuple[int, int, int, bool]
"""Rows, pre, tok, biased."""
T5_RULES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, tuple[Bias | None, Bias | None]]]] = {
    "all layers": ({}, {"encoder_prefix": ((3, 0, 3, True),) * 2, "self_prefix": ((3, 0, 3, True),) * 2}),
    "not the first": (
        {"leave_out": [0, 2]},
        {"encoder_prefix": (None, (3, 0, 0, False)), "self_prefix": (None, (3, 0, 0, False))},
    ),
    "not the last": (
        {"leave_out": [1, 3]},
        {
            "encoder_prefix": ((3, 0, 3, True), (0, 0, 0, False)),
            "self_prefix": ((3, 0, 3, True), (0, 0, 0, False)),
        },
    ),
    "no encoder": ({"encoder_prefix": False}, {"encoder_prefix": (None, None), "self_prefix": ((3, 0, 3, True),) * 2}),
    "no cross": ({"cross_prefix": False}, {"cross_prefix": (None, None)}),
}


@pytest.mark.parametrize("rule", T5_RULES)
def test_relative_bias_of_t5(rule: str, reading: Reading) -> None:
    changes, wanted = T5_RULES[rule]
    told = {**PREFIX, **changes}
    delta = reading(Made(told, prefixed("t5", told), "t5", pickled=True))
    for group, biases in wanted.items():
        for site, bias in zip(ATTENTIONS["t5"][group], biases, strict=True):
            if bias is None:
                assert site not in delta.at
            else:
                one = prefix_at(delta, site)
                assert (one.keys.shape[0], one.pre, one.tok, one.biased) == bias, site


@pytest.mark.parametrize("shared", [True, False])
def test_gated_prefix(shared: bool, reading: Reading) -> None:
    told = {**PREFIX, "use_gating": True, "shared_gating": shared}
    tensors, numbers = prefixed("bert", told), 1 if shared else 2
    for i in range(2):
        tensors |= Draw(i).linear(f"encoder.layer.{i}.attention.self.prefix_tuning.prefix_gates.a", HIDDEN, numbers)
    delta = reading(Made(told, tensors, pickled=True))
    gate = prefix_at(delta, ATTENTIONS["bert"]["self_prefix"][1]).gate
    assert gate is not None and gate.weight.shape == (numbers, HIDDEN)
    assert torch.equal(gate.weight, tensors["encoder.layer.1.attention.self.prefix_tuning.prefix_gates.a.weight"])


def rotation(made: Tensors, at: str) -> torch.Tensor:
    """R as torch's own parametrisation makes it from what is in the file."""
    module = torch.nn.Linear(HIDDEN, made[f"{at}.parametrizations.weight.original"].shape[0], bias=False)
    torch.nn.utils.parametrizations.orthogonal(module)
    inner: Any = module.parametrizations.weight  # type: ignore[union-attr]
    inner.original.data = made[f"{at}.parametrizations.weight.original"]
    inner[0].base = made[f"{at}.parametrizations.weight.0.base"]
    weight: torch.Tensor = module.weight.detach()
    return weight


def edits(told: Mapping[str, Any], family: str = "bert", name: str = "a") -> Tensors:
    draw, made = Draw(), Tensors()
    layer = {"bert": "encoder.layer", "gpt2": "h", "gemma2": "layers"}[family]
    for i in range(2) if told["layers"] == "all" else told["layers"]:
        for unit in range(1 if told.get("tied_weights") else 2):
            at = f"{layer}.{i}.reft_layer.refts.{name}.units.{unit}"
            made |= draw.linear(f"{at}.learned_source", HIDDEN, told["r"])
            if told["orthogonality"]:
                signs = torch.ones(told["r"]).copysign(draw(told["r"]))
                original = draw(told["r"], HIDDEN).tril(-1 if told["r"] == 1 else HIDDEN)
                original.diagonal().copy_(signs)
                base = torch.linalg.qr(draw(HIDDEN, HIDDEN)).Q.contiguous()
                made |= {f"{at}.projection.parametrizations.weight.original": original}
                made |= {f"{at}.projection.parametrizations.weight.0.base": base}
            else:
                made[f"{at}.projection.weight"] = draw(told["r"], HIDDEN)
    return made


def edited(made: Made, at: str, x: torch.Tensor) -> torch.Tensor:
    t, told = made.tensors, made.told
    f = {None: lambda z: z, "gelu": gelu, "leakyrelu": leaky_relu, "relu": torch.relu}[told.get("non_linearity")]
    onto = rotation(t, f"{at}.projection") if told["orthogonality"] else t[f"{at}.projection.weight"]
    z = f(linear(x, t[f"{at}.learned_source.weight"], t[f"{at}.learned_source.bias"]))
    return x + (z - x @ onto.T if told.get("subtract_projection", True) else z) @ onto


REFTS: Mapping[str, Mapping[str, Any]] = {
    "noreft": {},
    "loreft": {"orthogonality": True, "r": 3},
    "loreft, rank 1": {"orthogonality": True, "r": 1},
    "loreft, square": {"orthogonality": True, "r": HIDDEN},
    "gelu": {"non_linearity": "gelu"},
    "leakyrelu": {"non_linearity": "leakyrelu"},
    "relu": {"non_linearity": "relu", "orthogonality": True},
    "direft as it was meant": {"subtract_projection": False, "non_linearity": "gelu"},
    "one layer": {"layers": [1]},
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2"])
@pytest.mark.parametrize("what", REFTS)
def test_reft(what: str, family: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    """Where the norm stands behind, the layer gives what the norm gives; else h + r, or the norm's plus r."""
    told = {**REFT, **REFTS[what]}
    made = Made(told, edits(told, family), family)
    delta = reading(made)
    layers = range(2) if told["layers"] == "all" else told["layers"]
    at, layer = {
        "bert": ("bert.encoder.layer.{}.output.LayerNorm", "encoder.layer"),
        "gpt2": ("transformer.h.{}.mlp.c_proj", "h"),
        "gemma2": ("model.layers.{}.post_feedforward_layernorm", "layers"),
    }[family]
    assert set(delta.at) == {at.format(i) for i in layers} and delta.kinds == ("reft",)
    for i in layers:
        (one,) = delta.at[at.format(i)]
        assert isinstance(one, Bottleneck) and one.positions == Positions(2, 0, Reach.FIRST)
        h, r = Draw(1)(4, HIDDEN), Draw(2)(4, HIDDEN)
        stream = Stream(h, r, h, (lambda z: z) if family == "bert" else partial(torch.add, r))
        x = h if family == "bert" else h + r
        wanted = edited(made, f"{layer}.{i}.reft_layer.refts.a.units.0", x)
        assert error_ratio(stream.after((one,)), wanted) < EXACT
    said = any("DiReFT" in text for text in delta.provenance.warnings)
    assert said is not told["orthogonality"]


def test_reft_of_both_ends_on_an_encoder(reading: Reading) -> None:
    told = {**REFT, "suffix_positions": 3}
    chain = reading(Made(told, edits(told))).at["bert.encoder.layer.0.output.LayerNorm"]
    assert [getattr(one, "positions") for one in chain] == [  # noqa: B009
        Positions(2, 3, Reach.FIRST),
        Positions(2, 3, Reach.LAST),
    ]
    tied = {**told, "tied_weights": True}
    (one,) = reading(Made(tied, edits(tied))).at["bert.encoder.layer.0.output.LayerNorm"]
    assert isinstance(one, Bottleneck) and one.positions == Positions(2, 3, Reach.BOTH)


@pytest.mark.parametrize(("combine", "place"), [("prefix", 0), ("prefix_after_bos", 1)])
def test_prompt_behind_the_embeddings(combine: str, place: int, reading: Reading) -> None:
    rows = Draw()(3, HIDDEN)
    told = {**PROMPT, "combine": combine}
    delta = reading(Made(told, {"prompt_tuning.prompt_tunings.a.prompt_embedding.weight": rows}))
    assert delta.prompt is not None and delta.prompt.place == place and torch.equal(delta.prompt.rows, rows)
    assert delta.kinds == ("prompt-tuning",)
