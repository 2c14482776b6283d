"""Adapters, couplings, gates and placed prompts in converted deltas: all of their fields come back, or are refused."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import same

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Bottleneck, Coupling, Fusion, Gate, Net, OwnNorm, Positions, Reach, Tap
from deltaserve.deltas.delta import Delta, Provenance
from deltaserve.deltas.primitives import Affine, Prefix, SoftPrompt
from deltaserve.deltas.sites import BackboneSpec, Task
from deltaserve.errors import BadCheckpoint
from deltaserve.formats import native
from deltaserve.formats.registry import read
from deltaserve.formats.weighed import Weighed

HIDDEN, WIDE = 16, 25
LAYER = "bert.encoder.layer.0"
LAST, FIRST, ATTENTION = f"{LAYER}.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.attention.self"
FUSED, CHAIN = LAST.replace("0", "1"), f"{LAYER}.attention.output.dense"


@pytest.fixture
def spec(backbones: Mapping[str, Backbone]) -> BackboneSpec:
    return backbones["bert"].spec


def norm(width: int = HIDDEN) -> OwnNorm:
    return OwnNorm(torch.randn(width), torch.randn(width), 1e-6)


def bottleneck(width: int = HIDDEN, out: int = HIDDEN, **told: Any) -> Bottleneck:
    return Bottleneck(torch.randn(3, width), torch.randn(out, 3), torch.randn(3), torch.randn(out), "gelu_tanh", **told)


def full() -> Bottleneck:
    """Every field is other than its default."""
    return bottleneck(
        scale=0.5,
        input=Tap.RESIDUAL,
        carry=Tap.NORMED,
        carry_scale=0.25,
        carry_inside=True,
        before=norm(),
        after=norm(),
        gate=Gate(torch.randn(2, HIDDEN), torch.randn(2)),
        replaces=True,
        norm=f"{LAYER}.attention.output.LayerNorm",
        positions=Positions(2, 3, Reach.FIRST),
    )


def fused() -> Fusion:
    square = (torch.randn(HIDDEN, HIDDEN) for _ in range(3))
    return Fusion(
        (bottleneck(), bottleneck(WIDE, input=Tap.OWN, before=norm(WIDE))),
        query=next(square),
        query_bias=torch.randn(HIDDEN),
        key=next(square),
        key_bias=torch.randn(HIDDEN),
        value=next(square),
        query_tap=Tap.SUM,
        carry=Tap.RESIDUAL,
        carry_scale=0.5,
        members_carry=True,
        carry_inside=True,
        after=norm(),
        replaces=True,
        norm=f"{LAYER}.output.LayerNorm",
    )


def coupling() -> Coupling:
    half = HIDDEN // 2
    nets = (Net(torch.randn(3, half), torch.randn(3), torch.randn(half, 3), torch.randn(half), "relu") for _ in "fg")
    return Coupling(*nets, undone=True)


def whole() -> Delta:
    """What no checkpoint has in one: each new word with each of its fields set."""
    gated = Prefix(torch.randn(2, 2, 8), torch.randn(2, 2, 8), 1, 2, False, Gate(torch.randn(1, HIDDEN)))
    nothing = Prefix(torch.empty(0, 2, 8), torch.empty(0, 2, 8), biased=False)
    return Delta(
        ("adapter", "prefix-tuning"),
        {
            LAST: (full(), Affine(shift=torch.randn(HIDDEN))),
            FUSED: (fused(),),
            FIRST: (Bottleneck(torch.randn(2, WIDE), torch.randn(WIDE, 2), carry=None),),
            CHAIN: tuple(Bottleneck(torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2), carry=None) for _ in "ab"),
            ATTENTION: (gated,),
            ATTENTION.replace("0", "1"): (nothing,),
        },
        Task.EMBEDDING,
        Provenance("test", "0" * 64, 1, 2),
        prompt=SoftPrompt(torch.randn(2, HIDDEN), 1),
        coupling=coupling(),
    )


@pytest.fixture
def folder(spec: BackboneSpec, backbones: Mapping[str, Backbone], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    native.write(whole(), tmp_path / "whole", spec, Weighed(backbones["bert"].weights))
    return tmp_path / "whole"


def plain(part: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a part and of what is inside it, tensors left out."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(each):
                yield from plain(each)
            elif not isinstance(each, torch.Tensor):
                yield f"{type(part).__name__}.{field.name}", each


def test_every_field_comes_back(folder: Path, spec: BackboneSpec, backbones: Mapping[str, Backbone]) -> None:
    torch.manual_seed(0)
    delta = whole()
    assert same(read(folder, spec, backbones["bert"].weights), delta)
    for part in (full(), fused(), coupling()):
        for field in dataclasses.fields(part):
            assert getattr(part, field.name) != field.default, f"{field.name} would come back if it were forgotten"
    names = {name for part in (full(), fused(), coupling()) for name, _ in plain(part)}
    assert {"Positions.reach", "OwnNorm.eps", "Net.activation", "Bottleneck.norm"} <= names


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def told(*path: str | int, **changes: Any) -> Change:
    """Sets keys of the object at a place in the config."""

    def change(config: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
        found: Any = config
        for step in path:
            found = found[step]
        found.update(changes)

    return change


def first(**changes: Any) -> Change:
    return told("at", LAST, 0, **changes)


def fusion(**changes: Any) -> Change:
    return told("at", FUSED, 0, **changes)


def cut(end: str) -> Change:
    """Takes the last row of a tensor away."""

    def change(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith(end)]
        tensors[name] = tensors[name][:-1].contiguous()

    return change


def at_embedding(config: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    config["at"]["bert.embeddings.word_embeddings"] = config["at"].pop(FIRST)


BROKEN: Mapping[str, tuple[Change, tuple[str, ...]]] = {
    "tap": (first(input="nowhere"), ("'input'", "'nowhere'", "residual")),
    "tap-number": (first(carry=1), ("'carry'", "1", "residual")),
    "reach": (told("at", LAST, 0, "positions", reach="middle"), ("'reach'", "'middle'", "both")),
    "positions-none": (told("at", LAST, 0, "positions", first=0, last=0), ("positions", "none")),
    "positions-below": (told("at", LAST, 0, "positions", first=-1), ("positions", "-1")),
    "positions-word": (first(positions="all"), ("'positions'", "'all'", "an object")),
    "positions-field": (told("at", LAST, 0, "positions", middle=1), ("'positions'", "'middle'")),
    "positions-lacks": (first(positions={"first": 1}), ("'positions'", "no field 'last'")),
    "activation": (first(activation="glow"), ("activation", "'glow'", "relu")),
    "scale": (first(scale=float("inf")), ("'scale'", "finite")),
    "flag": (first(replaces=1), ("'replaces'", "true or false")),
    "down": (cut(f"{LAST} 0 Bottleneck.up"), ("Bottleneck.up", "[15, 3]", "[16, 3]")),
    "down-bias": (cut("0 Bottleneck.down_bias"), ("Bottleneck.down_bias", "[2]", "[3]")),
    "up-bias": (cut("0 Bottleneck.up_bias"), ("Bottleneck.up_bias", "[15]", "[16]")),
    "before": (cut("0 Bottleneck.before.bias"), ("before.bias", "[15]", "[16]")),
    "after": (cut("0 Bottleneck.after.weight"), ("after.weight", "[15]", "[16]")),
    "eps": (told("at", LAST, 0, "after", eps=0), ("after.eps",)),
    "gate": (cut("0 Bottleneck.gate.bias"), ("gate.bias", "[1]", "[2]")),
    "norm": (first(norm=LAST), ("Bottleneck.norm", "no norm")),
    "norm-nowhere": (first(norm="x" * 500), ("Bottleneck.norm", "no norm")),
    "tapped-here": (told("at", FIRST, 0, input="residual"), ("'residual'", "no sublayer", FIRST)),
    "replaces-here": (told("at", FIRST, 0, replaces=True), ("replaces", "no sublayer", FIRST)),
    "carry-width": (told("at", FIRST, 0, carry="own"), ("'own'", "16", "25")),
    "at-an-embedding": (at_embedding, ("Bottleneck", "embedding", "LowRank")),
    "replaces-early": (told("at", CHAIN, 0, replaces=True), (CHAIN, "replaces", "last")),
    "members": (fusion(members=[]), ("members", "empty")),
    "members-word": (fusion(members="all"), ("'members'", "a list")),
    "members-many": (fusion(members=[{}] * 2000), ("'members'", "a list of at most")),
    "member": (cut("0 Fusion.members.1.down"), ("members.1.up", "[16, 3]", "[16, 2]")),
    "member-type": (fusion(members=[5]), ("'members', entry 0", "an object")),
    "query": (cut("0 Fusion.query"), ("Fusion.query", "[15, 16]", "[16, 16]")),
    "key-bias": (cut("0 Fusion.key_bias"), ("Fusion.key_bias", "[15]")),
    "query-tap": (fusion(query_tap="own"), ("'own'", "25", "16")),
    "prefix-gate": (told("at", ATTENTION, 0, "gate", bias="nowhere"), ("'nowhere'", "missing")),
    "prefix-lengths": (cut("0 Prefix.values"), ("Prefix.values", "[1, 2, 8]", "[2, 2, 8]")),
    "place": (told("prompt", place=2), ("place", "2")),
    "place-below": (told("prompt", place=-1), ("place", "-1")),
    "coupling": (told(coupling={"type": "SoftPrompt"}), ("coupling", "rows")),
    "coupling-net": (told("coupling", f={}), ("'f'", "no field 'down'")),
    "coupling-half": (cut("Coupling.f.up"), ("coupling", "f.up", "[7, 3]", "[8, 3]")),
    "coupling-activation": (told("coupling", "g", activation="glow"), ("g.activation", "'glow'")),
}


@pytest.mark.parametrize("gated", ["adapter", "prefix"])
def test_gates_are_for_encoders(gated: str, backbones: Mapping[str, Backbone], tmp_path: Path) -> None:
    """Causal rows do not see the rows that a gate averages over."""
    spec, weights = backbones["llama"].spec, backbones["llama"].weights
    width = spec.hidden_size
    gate = Gate(torch.randn(1, width))
    if gated == "adapter":
        at: Any = {spec.sublayers[0].last: (Bottleneck(torch.randn(3, width), torch.randn(width, 3), gate=gate),)}
    else:
        site = spec.sites[spec.prefix_sites[0]]
        keys = torch.randn(2, site.kv_heads, site.head_dim)
        at = {site.name: (Prefix(keys, keys, gate=gate),)}
    delta = Delta((gated if gated == "adapter" else "prefix-tuning",), at, Task.GENERATION, whole().provenance)
    native.write(delta, tmp_path / "gated", spec, Weighed(weights))
    with pytest.raises(BadCheckpoint, match=r"gate.*encoder"):
        read(tmp_path / "gated", spec, weights)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(
    name: str, folder: Path, spec: BackboneSpec, backbones: Mapping[str, Backbone]
) -> None:
    change, said = BROKEN[name]
    config, tensors = json.loads((folder / "delta.json").read_text()), load_file(folder / "delta.safetensors")
    change(config, tensors)
    (folder / "delta.json").write_text(json.dumps(config))
    save_file(tensors, folder / "delta.safetensors")
    with pytest.raises(BadCheckpoint) as caught:
        read(folder, spec, backbones["bert"].weights)
    assert all(word in caught.value.message for word in said), caught.value.message
