"""Several of AdapterHub's adapters together: what a setup's folder comes to is what the library computes with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import (
    HIDDEN,
    HOULSBY,
    LORA,
    PAR,
    PLACES,
    PREFIX,
    PROMPT,
    REFT,
    SEQ,
    Draw,
    Made,
    Reading,
    Stream,
    Tensors,
    bottlenecks,
    save,
)
from test_adapterhub import library, stream_of
from test_adapterhub_lowrank import EVERY, compare
from torch.nn.functional import linear

from deltaserve.backbone.model import Backbone
from deltaserve.errors import InvalidArgument
from deltaserve.formats.registry import Wanted
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
FAMILIES = ("bert", "gpt2", "gemma2")
SMALL: Mapping[str, Any] = {**SEQ, "reduction_factor": 8, "non_linearity": "gelu"}


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def block(kind: str, *names: Any, **known: Any) -> dict[str, Any]:
    children = [one if isinstance(one, dict) else {"type": "single", "children": [one]} for one in names]
    return {"type": kind, "children": children, **({"kwargs": known} if known else {})}


class Setup:
    """Adapters in folders of their own, called otherwise than the adapters are."""

    def __init__(self, place: Path, made: Sequence[Made], setup: Any) -> None:
        self.folder, self.family = place / "setup", made[0].family
        self.made = {one.name: one for one in made}
        for number, one in enumerate(made):
            one.write(self.folder / f"folder-{number}")
        self.say(setup)

    def say(self, setup: Any, **known: Any) -> None:
        told = {"adapter_setup": setup, "head_setup": None, "version": "adapters.1.3.0", **known}
        (self.folder / "adapter_setup.json").write_text(json.dumps(told))

    def fusion(self, names: Sequence[str], tensors: Tensors, told: Any, **known: Any) -> None:
        folder = self.folder / "fused"
        folder.mkdir(exist_ok=True)
        config = {"name": ",".join(names), "adapter_names": list(names), "config": told, "model_type": self.family}
        (folder / "adapter_fusion_config.json").write_text(json.dumps({**config, **known}))
        save(tensors, folder, "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


def pair(family: str, first: Mapping[str, Any] = SEQ, second: Mapping[str, Any] = SMALL) -> list[Made]:
    return [
        Made(told, bottlenecks(told, family, name, seed), family, name)
        for seed, (name, told) in enumerate((("a", first), ("b", second)))
    ]


def ends(backbone: Backbone, family: str) -> list[tuple[str, str]]:
    """Where sublayers end, and the module that the library calls so."""
    keys = {"attention": "mh_adapter"}
    return [(s.last, PLACES[family](s.layer, keys.get(s.part, "output_adapter"))) for s in backbone.spec.sublayers]


def alone(made: Made, at: str, stream: Stream, norm: Any) -> torch.Tensor:
    """An adapter's result before the model's own end, which takes nothing away."""
    open_ended = Stream(stream.h, stream.r, stream.own, lambda z: z)
    return library(made.told, f"{at}.adapters.{made.name}", made.tensors, open_ended, norm, hooked=True)


STACKS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "in a row": (SEQ, SMALL),
    "at other places": (HOULSBY, SMALL),
    "beside, then in a row": (PAR, SMALL),
    "in a row, then beside": (SEQ, PAR),
    "norms of their own": ({**SEQ, "ln_after": True}, {**SMALL, "ln_before": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", STACKS)
def test_stack(what: str, family: str, reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    made = pair(family, *STACKS[what])
    setup = Setup(tmp_path, made, block("Stack", "a", "b"))
    delta = reading(setup.folder, family)
    stream, norm = stream_of(family)
    met = 0
    for last, at in ends(backbones[family], family):
        h = stream.h
        present = [one for one in made if f"{at}.adapters.{one.name}.adapter_up.weight" in one.tensors]
        for number, one in enumerate(present):
            final = number == len(present) - 1
            if one.told.get("is_parallel"):
                z = alone(one, at, Stream(stream.h, stream.r, stream.own, lambda z: z), norm)
                # It adds the sublayer's own output where it is last, and none where it is not.
                h = z if final else z - stream.h
            else:
                h = alone(one, at, Stream(h, stream.r, stream.own, lambda z: z), norm)
        assert bool(present) == (last in delta.at)
        if present:
            assert error_ratio(stream.after(delta.at[last]), stream.ends(h)) < EXACT, at
            met += 1
    assert met >= 2


AVERAGES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "alike": (SEQ, {**SEQ, "reduction_factor": 8}),
    "unlike": (SEQ, SMALL),
    "beside": (PAR, {**PAR, "reduction_factor": 8}),
    "norms of their own": (SEQ, {**SEQ, "ln_before": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", AVERAGES)
def test_average(what: str, family: str, reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    """(1/2) Σ w_k z_k: once more divided by how many there are, the residual too."""
    made = pair(family, *AVERAGES[what])
    delta = reading(Setup(tmp_path, made, block("Average", "a", "b", weights=[0.25, 0.75])).folder, family)
    stream, norm = stream_of(family)
    for last, at in ends(backbones[family], family):
        if "output" not in at or "attention" in at:
            continue
        parallel = made[0].told.get("is_parallel")
        parts = [alone(one, at, stream, norm) - (stream.h if parallel else 0) for one in made]
        mean = (0.25 * parts[0] + 0.75 * parts[1]) / 2 + (stream.h if parallel else 0)
        assert error_ratio(stream.after(delta.at[last]), stream.ends(mean)) < EXACT, at


def test_weights_of_an_average_are_divided_by_their_sum(
    reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    made = pair("bert", SEQ, {**SEQ, "reduction_factor": 8})
    setup = Setup(tmp_path, made, block("Average", "a", "b", weights=[0.25, 0.75]))
    wanted = reading(setup.folder)
    setup.say(block("Average", "a", "b", weights=[1, 3]))
    found = reading(setup.folder)
    for name in wanted.at:
        stream, _ = stream_of("bert")
        assert error_ratio(stream.after(found.at[name]), stream.after(wanted.at[name])) < EXACT
    assert any("sum to 4" in text for text in found.provenance.warnings) and not wanted.provenance.warnings


def fusion_of(family: str, told: Mapping[str, Any], name: str) -> Tensors:
    draw, made = Draw(11), Tensors()
    for layer in range(2):
        at = f"{PLACES[family](layer, 'output_adapter')}.adapter_fusion_layer.{name}"
        for word in ("query", "key"):
            if told.get(word):
                made |= draw.linear(f"{at}.{word}", HIDDEN, HIDDEN)
        if told.get("value"):
            made[f"{at}.value.weight"] = draw(HIDDEN, HIDDEN)
    return made


def fused(members: Sequence[Made], told: Mapping[str, Any], t: Tensors, at: str, stream: Stream, norm: Any) -> Any:
    """The library's AdapterFusion at one place."""
    ending = members[-1].told
    parallel = ending.get("is_parallel")
    h, r = stream.h, stream.r
    x = r if parallel else ((h + r if norm is None else norm(h + r)) if ending["original_ln_before"] else h)
    q = r if parallel else h
    query = r if parallel else h if told.get("query_before_ln") else x
    parts = []
    for one in members:
        bare = Made({**one.told, "is_parallel": False, "original_ln_before": False}, one.tensors, name=one.name)
        parts.append(alone(bare, at, Stream(x, r, r, lambda z: z), None) - x)
    u = torch.stack(parts, 1)
    if told.get("residual_before"):
        u = u + q.unsqueeze(1)
    name = f"{at}.adapter_fusion_layer." + ",".join(one.name for one in members)
    asked = linear(query, t[f"{name}.query.weight"], t[f"{name}.query.bias"])
    keys = linear(u, t[f"{name}.key.weight"], t[f"{name}.key.bias"]) if told.get("key") else u
    p = torch.einsum("nd,nkd->nk", asked, keys).softmax(-1)
    c = torch.einsum("nk,nkd->nd", p, u @ t[f"{name}.value.weight"].T if told.get("value") else u)
    c = c if told.get("residual_before") else c + q
    return stream.ends(c + h if parallel else c)


FUSIONS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "dynamic": (SEQ, SMALL, {"query": True, "key": True, "value": True}),
    "static": (SEQ, SMALL, {"query": True, "key": True, "value": False}),
    "no key": (SEQ, SMALL, {"query": True, "key": False, "value": True}),
    "residual before": (SEQ, SMALL, {"query": True, "key": True, "value": True, "residual_before": True}),
    "query before": (SEQ, SMALL, {"query": True, "key": True, "value": True, "query_before_ln": True}),
    "value after": (SEQ, SMALL, {"query": True, "key": True, "value": True, "value_before_softmax": False}),
    "beside": (PAR, {**PAR, "reduction_factor": 8}, {"query": True, "key": True, "value": True}),
    "scaled": (
        {**SEQ, "scaling": "channel"},
        {**SMALL, "ln_before": True},
        {"query": True, "key": True, "value": True},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", FUSIONS)
def test_fusion(what: str, family: str, reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    *kinds, told = FUSIONS[what]
    made = pair(family, *kinds)
    setup = Setup(tmp_path, made, block("Fuse", "a", "b"))
    tensors = fusion_of(family, told, "a,b")
    setup.fusion(("a", "b"), tensors, {"regularization": True, "temperature": False, **told})
    delta = reading(setup.folder, family)
    stream, norm = stream_of(family)
    for last, at in ends(backbones[family], family):
        if last in delta.at:
            assert error_ratio(stream.after(delta.at[last]), fused(made, told, tensors, at, stream, norm)) < EXACT, at
    assert len(delta.at) == 2 and delta.kinds[-1] == "adapter-fusion"


def test_fusion_at_the_end_of_a_stack(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    told = {"query": True, "key": True, "value": True}
    made = [*pair("bert"), Made(SEQ, bottlenecks(SEQ, name="c", seed=5), name="c")]
    setup = Setup(tmp_path, made, block("Stack", "c", block("Fuse", "a", "b")))
    tensors = fusion_of("bert", told, "a,b")
    setup.fusion(("a", "b"), tensors, told)
    delta = reading(setup.folder)
    stream, norm = stream_of("bert")
    for last, at in ends(backbones["bert"], "bert"):
        if last in delta.at:
            first = alone(made[2], at, stream, norm)
            wanted = fused(made[:2], told, tensors, at, Stream(first, stream.r, stream.own, stream.ends, norm), norm)
            assert error_ratio(stream.after(delta.at[last]), wanted) < EXACT


def loras(first: Mapping[str, Any] = LORA, second: Mapping[str, Any] = LORA) -> list[Made]:
    found = []
    for seed, (name, told) in enumerate((("a", first), ("b", second))):
        draw, tensors = Draw(seed), Tensors()
        for at in EVERY["bert"]:
            if told["composition_mode"] == "add":
                tensors[f"{at}.loras.{name}.lora_A"] = draw(told["r"], HIDDEN)
            tensors[f"{at}.loras.{name}.lora_B"] = draw(HIDDEN, told["r"])
        found.append(Made(told, tensors, name=name))
    return found


def test_stacked_lora_is_a_product(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    made = loras(second={**LORA, "r": 2, "alpha": 1})
    delta = reading(Setup(tmp_path, made, block("Stack", "a", "b")).folder)
    t = made[0].tensors | made[1].tensors

    def wanted(_: Tensors, at: str, x: torch.Tensor, w: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        other = at.removesuffix(".a") + ".b"
        z = 2.0 * (x @ t[f"{at}.lora_A"].T) @ t[f"{at}.lora_B"].T
        return base + 0.5 * (z @ t[f"{other}.lora_A"].T) @ t[f"{other}.lora_B"].T

    compare(Made(LORA, t), delta, backbones["bert"], EVERY["bert"], wanted)


def test_averaged_lora(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    made = loras(second={**LORA, "r": 2, "alpha": 1})
    delta = reading(Setup(tmp_path, made, block("Average", "a", "b", weights=[0.25, 0.75])).folder)
    t = made[0].tensors | made[1].tensors

    def wanted(_: Tensors, at: str, x: torch.Tensor, w: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        other = at.removesuffix(".a") + ".b"
        first = 2.0 * (x @ t[f"{at}.lora_A"].T) @ t[f"{at}.lora_B"].T
        second = 0.5 * (x @ t[f"{other}.lora_A"].T) @ t[f"{other}.lora_B"].T
        return base + (0.25 * first + 0.75 * second) / 2

    compare(Made(LORA, t), delta, backbones["bert"], EVERY["bert"], wanted)


VECTOR: Mapping[str, Any] = {**LORA, "r": 1, "alpha": 2, "composition_mode": "scale"}


@pytest.mark.parametrize(("kind", "known"), [("Stack", {}), ("Average", {"weights": [0.25, 0.75]})])
def test_several_ia3(
    kind: str, known: Any, reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    made = loras(VECTOR, VECTOR)
    delta = reading(Setup(tmp_path, made, block(kind, "a", "b", **known)).folder)
    t = made[0].tensors | made[1].tensors

    def wanted(_: Tensors, at: str, x: torch.Tensor, w: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        one, two = (2 * t[f"{name}.lora_B"].squeeze(1) for name in (at, at.removesuffix(".a") + ".b"))
        return base * (one * two if kind == "Stack" else (0.25 * one + 0.75 * two) / 2)

    compare(Made(VECTOR, t), delta, backbones["bert"], EVERY["bert"], wanted)


def test_other_methods_of_a_stack_act_beside_each_other(
    reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path
) -> None:
    made = [loras()[0], pair("bert")[1]]
    delta = reading(Setup(tmp_path, made, block("Stack", "a", "b")).folder)
    assert delta.kinds == ("lora", "adapter") and len(delta.at) == 6


def flat(name: str, rows: int, seed: int) -> Made:
    at = f"prefix_tuning.prefix_tunings.{name}.self_prefix.control_trans"
    return Made({**PREFIX, "prefix_length": rows}, {at: Draw(seed)(rows * 2 * 2 * HIDDEN)}, name=name)


def test_a_later_prefix_stands_first(reading: Reading, tmp_path: Path) -> None:
    made = [flat("a", 3, 1), flat("b", 2, 2)]
    delta = reading(Setup(tmp_path, made, block("Stack", "a", "b")).folder)
    whole = [one.tensors[next(iter(one.tensors))].view(-1, 4, 2, 8) for one in made]
    for layer in range(2):
        (prefix,) = delta.at[f"bert.encoder.layer.{layer}.attention.self"]
        assert torch.equal(getattr(prefix, "keys"), torch.cat([w[:, 2 * layer] for w in (whole[1], whole[0])]))  # noqa: B009


def reft(name: str) -> Made:
    draw, tensors = Draw(), Tensors()
    for i in range(2):
        for unit in range(2):
            at = f"encoder.layer.{i}.reft_layer.refts.{name}.units.{unit}"
            tensors |= draw.linear(f"{at}.learned_source", HIDDEN, 2) | {f"{at}.projection.weight": draw(2, HIDDEN)}
    return Made(REFT, tensors, name=name)


def test_of_several_reft_and_prompts_the_first_acts(reading: Reading, tmp_path: Path) -> None:
    delta = reading(Setup(tmp_path / "r", [reft("a"), reft("b")], block("Stack", "a", "b")).folder)
    wanted = reading(reft("a"))
    assert {name: len(parts) for name, parts in delta.at.items()} == {name: 1 for name in wanted.at}
    assert any("no ReFT but the first" in text for text in delta.provenance.warnings)
    rows = {name: Draw(seed)(3, HIDDEN) for seed, name in enumerate("ab")}
    prompts = [
        Made(PROMPT, {f"prompt_tuning.prompt_tunings.{n}.prompt_embedding.weight": t}, name=n) for n, t in rows.items()
    ]
    delta = reading(Setup(tmp_path / "p", prompts, block("Stack", "b", "a")).folder)
    assert delta.prompt is not None and torch.equal(delta.prompt.rows, rows["b"])


def test_a_task_of_several(reading: Reading, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    made = loras()
    setup = Setup(tmp_path, made, block("MultiTask", "a", "b"))
    said = reading.refused(setup.folder, "for 2 tasks", "from 0 to 1", error=InvalidArgument)
    assert said.reason == "BAD_TASK_ID"
    for number in range(2):
        delta = reading(setup.folder, wanted=Wanted(task_id=number))
        wanted = reading(made[number])
        assert delta.task_id == number
        for name, parts in wanted.at.items():
            assert torch.equal(getattr(delta.at[name][0], "b"), getattr(parts[0], "b"))  # noqa: B009
    reading.refused(setup.folder, "task_id is 2", error=InvalidArgument, wanted=Wanted(task_id=2))
    setup.say(block("Stack", "a"))
    reading.refused(setup.folder, "leave it out", error=InvalidArgument, wanted=Wanted(task_id=0))
    reading.refused(made[0], "leave it out", error=InvalidArgument, wanted=Wanted(task_id=0))
