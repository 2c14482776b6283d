"""AdapterHub's bottleneck adapters: every option, at the end of a sublayer, is what the library's equations say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import (
    COMPACTER,
    HIDDEN,
    HOULSBY,
    PAR,
    PLACES,
    SEQ,
    Draw,
    Made,
    Reading,
    Stream,
    Tensors,
    bottlenecks,
    save,
    width_of,
)
from torch.nn.functional import layer_norm, linear
from transformers.activations import get_activation

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.primitives import SitePrimitive
from deltaserve.errors import DeltaserveError
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
POST, PRE, HOOKED = ("bert",), ("gpt2", "t5", "llama"), ("gemma2",)


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def library(
    told: Mapping[str, Any], at: str, tensors: Tensors, stream: Stream, norm: Any, hooked: bool
) -> torch.Tensor:
    """The stream behind a sublayer as the library computes it. `norm` is the model's LN behind h + r, or None."""
    h, r = stream.h, stream.r
    down = f"{at}.adapter_down.{1 if told.get('ln_before') else 0}"
    x, q = h, h
    if told.get("is_parallel"):
        x = r
    elif told["original_ln_before"]:
        x = h + r if norm is None else norm(h + r)
        q = {True: h, False: x, "post_add": h + r}[told["residual_before_ln"]]
    elif told["residual_before_ln"] is False:
        q = x
    n = x
    if told.get("ln_before"):
        n = layer_norm(x, (HIDDEN,), tensors[f"{at}.adapter_down.0.weight"], tensors[f"{at}.adapter_down.0.bias"])
    name = told["non_linearity"]
    f = torch.nn.functional.leaky_relu if name == "leakyrelu" else get_activation(name)
    z = f(linear(n, tensors[f"{down}.weight"], tensors[f"{down}.bias"]))
    z = linear(z, tensors[f"{at}.adapter_up.weight"], tensors[f"{at}.adapter_up.bias"])
    z = z * (tensors[f"{at}.scaling"] if isinstance(told["scaling"], str) else told["scaling"])
    if told.get("use_gating"):
        z = z * torch.sigmoid(linear(x, tensors[f"{at}.gate.weight"], tensors[f"{at}.gate.bias"])).mean(0)
    inside = told.get("adapter_residual_before_ln") and not told.get("is_parallel")
    if inside:
        z = z + q
    if told.get("ln_after"):
        after = f"{at}.adapter_norm_after"
        z = layer_norm(z, (HIDDEN,), tensors[f"{after}.weight"], tensors[f"{after}.bias"])
    if told.get("is_parallel"):
        z = z + h
    elif not inside:
        z = z + q
    return stream.ends(z) if told["original_ln_after"] or hooked else z


def stream_of(family: str, seed: int = 3) -> tuple[Stream, Any]:
    """Random rows at the end of a sublayer; the model's norm behind h + r, None in families whose norm is before."""
    draw = Draw(seed)
    weight, bias = 1 + draw(HIDDEN), draw(HIDDEN)
    made = Stream(draw(5, HIDDEN), draw(5, HIDDEN), draw(5, HIDDEN), lambda z: z)
    made.ends = lambda z: z + made.r
    if family in POST + HOOKED:
        made.norm = lambda x: layer_norm(x, (HIDDEN,), weight, bias)
    if family in POST:
        made.ends = lambda z: layer_norm(z + made.r, (HIDDEN,), weight, bias)
    return made, made.norm


def checked(made: Made, delta_at: Mapping[str, tuple[SitePrimitive, ...]], backbone: Backbone) -> int:
    """Compares every place; says how many there are."""
    stream, norm = stream_of(made.family)
    met = 0
    for sublayer in backbone.spec.sublayers:
        key = {"attention": "mh_adapter", "cross_attention": "cross_adapter"}.get(sublayer.part, "output_adapter")
        at = f"{PLACES[made.family](sublayer.layer, key)}.adapters.{made.name}"
        chain = delta_at.get(sublayer.last, ())
        assert bool(chain) == any(name.startswith(at + ".") for name in made.tensors), at
        if chain:
            wanted = library(made.told, at, made.tensors, stream, norm, made.family in HOOKED)
            assert error_ratio(stream.after(chain), wanted) < EXACT, at
            met += 1
    return met


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "seq_bn": {},
    "houlsby": HOULSBY,
    "parallel": PAR,
    "parallel both": {**PAR, "mh_adapter": True},
    "parallel, own norms": {**PAR, "ln_before": True, "ln_after": True},
    "parallel, learned": {**PAR, "scaling": "learned"},
    "parallel, no end": {**PAR, "original_ln_after": False},
    "leakyrelu": {"non_linearity": "leakyrelu"},
    "gelu_new": {"non_linearity": "gelu_new"},
    "tanh": {"non_linearity": "tanh"},
    "houlsby behind the norm": {**HOULSBY, "original_ln_before": True},
    "residual behind": {"residual_before_ln": False},
    "houlsby, residual behind": {**HOULSBY, "residual_before_ln": False},
    "post_add": {"residual_before_ln": "post_add"},
    "own norm before": {"ln_before": True},
    "own norm after": {"ln_after": True},
    "own norm after all": {"ln_after": True, "adapter_residual_before_ln": True},
    "own norms": {"ln_after": True, "ln_before": True, "residual_before_ln": False},
    "no end": {"original_ln_after": False},
    "adapter plus": {"original_ln_after": False, "residual_before_ln": False, "scaling": "channel"},
    "scale": {"scaling": 2.5},
    "learned": {"scaling": "learned"},
    "channel": {"scaling": "channel"},
    "gate": {"use_gating": True},
    "parallel, gate": {**PAR, "use_gating": True},
    "left out": {"leave_out": [0]},
    "widths": {"reduction_factor": {"0": 2, "1": 0.5, "default": 64}},
    "wider than a row": {"reduction_factor": 100},
    "crossed": {"cross_adapter": True, "mh_adapter": True},
}
NOT: Mapping[str, tuple[str, ...]] = {
    "post_add": PRE, "gate": PRE + HOOKED, "parallel, gate": PRE + HOOKED,
    **dict.fromkeys(("no end", "adapter plus", "parallel, no end"), HOOKED),
}  # fmt: skip


@pytest.mark.parametrize("family", POST + PRE + HOOKED)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, family: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**SEQ, **OPTIONS[option]}
    made = Made(told, bottlenecks(told, family), family)
    if family in NOT.get(option, ()):
        reading.refused(made, "config key", error=DeltaserveError)
        return
    delta = reading(made)
    assert checked(made, delta.at, backbones[family]) >= 1
    assert delta.kinds == ("parallel-adapter" if told.get("is_parallel") else "adapter",)
    assert delta.provenance.tensors_matched == len(made.tensors) and delta.provenance.format == "adapterhub"


def compacted(told: Mapping[str, Any], draw: Draw) -> tuple[Tensors, Tensors]:
    """What is shared by all layers, the tensors of one place below its name, and what they come to below `whole`."""
    n, k, width = told["phm_dim"], told.get("phm_rank", 1), width_of(told, 0)
    shared, own, whole = Tensors(), Tensors(), Tensors()
    rules = own if told.get("shared_phm_rule") is False else shared
    for word, inputs, outputs in (("down", HIDDEN, width), ("up", width, HIDDEN)):
        at = "adapter_down.0" if word == "down" else "adapter_up"
        rule_at = f"{at}." if rules is own else ""
        if f"{rule_at}phm_rule" not in rules and f"{rule_at}phm_rule_left" not in rules:
            if told.get("factorized_phm_rule"):
                rules |= {f"{rule_at}phm_rule_left": draw(n, n, 1), f"{rule_at}phm_rule_right": draw(n, 1, n)}
            else:
                rules[f"{rule_at}phm_rule"] = draw(n, n, n)
        rule = rules.get(f"{rule_at}phm_rule")
        if rule is None:
            rule = rules[f"{rule_at}phm_rule_left"] @ rules[f"{rule_at}phm_rule_right"]
        weights, start = (shared, f"W_{word}") if told.get("shared_W_phm") else (own, f"{at}.W")
        if told.get("factorized_phm_W", True):
            weights |= {f"{start}_left": draw(n, inputs // n, k), f"{start}_right": draw(n, k, outputs // n)}
            weight = weights[f"{start}_left"] @ weights[f"{start}_right"]
        else:
            weights[start] = weight = draw(n, inputs // n, outputs // n)
        total = torch.stack([torch.kron(rule[i], weight[i]) for i in range(n)]).sum(0)
        own[f"{at}.b"] = draw(outputs)
        whole |= {f"{at}.weight": total.T, f"{at}.bias": own[f"{at}.b"]}
    return shared, {**own, **{f"whole.{name}": tensor for name, tensor in whole.items()}}


RULES: Mapping[str, Mapping[str, Any]] = {
    "shared rule": {},
    "own rule": {"shared_phm_rule": False},
    "factored rule": {"factorized_phm_rule": True},
    "own factored rule": {"factorized_phm_rule": True, "shared_phm_rule": False},
    "whole weights": {"factorized_phm_W": False},
    "rank 2": {"phm_rank": 2},
    "four": {"phm_dim": 4},
    "scaled": {"scaling": 3.0},
}


@pytest.mark.parametrize("rule", [*RULES, "shared weights"])
def test_compacter_is_expanded(rule: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**COMPACTER, **RULES.get(rule, {"shared_W_phm": True}), "leave_out": [1]}
    shared, own = compacted(told, Draw())
    at = f"{PLACES['bert'](0, 'output_adapter')}.adapters.a"
    tensors = {f"shared_parameters.a.{name}": tensor for name, tensor in shared.items()}
    tensors |= {f"{at}.{name}": tensor for name, tensor in own.items() if not name.startswith("whole.")}
    delta = reading(Made(told, tensors))
    assert delta.kinds == ("compacter",)
    whole = {f"{at}.{n.removeprefix('whole.')}": t for n, t in own.items() if n.startswith("whole.")}
    assert checked(Made(told, whole), delta.at, backbones["bert"]) == 1


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_invertible(family: str, reading: Reading) -> None:
    told = {**SEQ, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    made = Made(told, bottlenecks(told, family), family)
    delta = reading(made)
    assert delta.kinds == ("adapter", "invertible-adapter")
    at = ("encoder." if family == "t5" else "") + "invertible_adapters.a"
    assert delta.coupling is not None and not delta.coupling.undone
    for word, net in (("F", delta.coupling.f), ("G", delta.coupling.g)):
        assert net.activation == "relu"
        assert torch.equal(net.down, made.tensors[f"{at}.{word}.0.weight"])
        assert torch.equal(net.up_bias, made.tensors[f"{at}.{word}.2.bias"])


def test_invertible_of_a_hooked_family_is_undone(reading: Reading) -> None:
    told = {**SEQ, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    coupling = reading(Made(told, bottlenecks(told, "gemma2"), "gemma2")).coupling
    assert coupling is not None and coupling.undone


@pytest.mark.parametrize("name", ["adapters", "loras", "prefix_tunings", "a_b-c", "漢字"])
def test_name_may_be_a_word_of_the_library(name: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    made = Made(SEQ, bottlenecks(SEQ, name=name), name=name)
    assert checked(made, reading(made).at, backbones["bert"]) == 2


@pytest.mark.parametrize("start", ["bert.", ""])
def test_prefix_of_names_is_not_required(start: str, reading: Reading, tmp_path: Path) -> None:
    made = Made(SEQ, bottlenecks(SEQ))
    folder = made.write(tmp_path / "one")
    save({start + name: tensor for name, tensor in made.tensors.items()}, folder, "adapter.safetensors", "")
    assert len(reading(folder).at) == 2


def test_what_an_older_library_wrote(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    """A name for a config, no version, other words in tensors' names, and an invertible adapter that is not there."""
    told = {**SEQ, "reduction_factor": 16}
    made = Made(told, bottlenecks(told))
    old = {
        name.replace("output.adapters", "output.layer_text_task_adapters"): tensor
        for name, tensor in made.tensors.items()
    }
    for config in ("pfeiffer", told, "pfeiffer+inv"):
        known = {"version": ..., "type": "text_task"}
        assert checked(made, reading(Made(config, old, known=known)).at, backbones["bert"]) == 2


@pytest.mark.parametrize(("told", "meant"), [("gelu", "gelu_tanh"), ("gelu_orig", "gelu"), ("swish", "silu")])
def test_activations_without_a_version(told: str, meant: str, reading: Reading) -> None:
    config = {**SEQ, "non_linearity": told}
    made = Made(config, bottlenecks({**SEQ}), known={"version": ...})
    (first, *_) = reading(made).at["bert.encoder.layer.0.output.dense"]
    assert getattr(first, "activation") == meant  # noqa: B009


def test_nested_invertible_adapter(reading: Reading) -> None:
    told = {**SEQ, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    nested = {**SEQ, "invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}
    assert reading(Made(nested, bottlenecks(told))).coupling is not None


def test_modernbert_takes_what_a_sublayer_gets_for_the_stream(reading: Reading) -> None:
    """Its interface names the sublayers themselves; what stands beside them is their input, behind the norm."""
    delta = reading(Made(PAR, bottlenecks(PAR, "modernbert"), "modernbert"))
    assert {getattr(one, "input") for chain in delta.at.values() for one in chain} == {"input"}  # noqa: B009
    assert len(reading(Made(HOULSBY, bottlenecks(HOULSBY, "modernbert"), "modernbert")).at) == 4
