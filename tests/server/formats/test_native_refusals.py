"""Converted deltas that are broken: refused in words that say what is wrong and where."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch


def key(name: str, value: Any) -> Callable[[Any], None]:
    return lambda spoilt: spoilt.config(lambda told: told.update({name: value}))


def field(type_: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda spoilt: spoilt.config(lambda told: spoilt.first(type_)(told).update({name: value}))


def tensor(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda spoilt: spoilt.tensor(end, change)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    return lambda spoilt: spoilt.config(change)


def put(place: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


def moved_site(told: dict[str, Any]) -> None:
    told["at"]["transformer.h.7.attn.c_attn"] = told["at"].pop("transformer.h.1.attn.c_attn")


def other_site(told: dict[str, Any]) -> None:
    told["at"]["transformer.h.1.ln_1"] = told["at"].pop("transformer.h.1.attn.c_attn")


def twice(told: dict[str, Any]) -> None:
    parts = next(iter(told["at"].values()))
    parts.append(parts[0])


def cut(name: str) -> Callable[[Any], None]:
    def change(spoilt: Any) -> None:
        file = spoilt.folder / name
        file.write_bytes(file.read_bytes()[:-9])

    return change


def view(offset: int, shape: list[int], stride: list[int]) -> dict[str, Any]:
    return {"base": "base.1", "offset": offset, "shape": shape, "stride": stride}


def unused_base(spoilt: Any) -> None:
    spoilt.tensors(lambda found: found.update({"base.2": torch.ones(3)}))
    spoilt.config(lambda told: told["bases"].append("base.2"))


def overflown(spoilt: Any) -> None:
    spoilt.tensor("LowRank.inner", lambda t: torch.full_like(t, 3e38))
    spoilt.tensor("base.0", put(0, 100.0))


def huge(spoilt: Any) -> None:
    spoilt.tensor("LowRank.a", lambda t: t[:1].repeat(1 << 15, 1))
    spoilt.tensor("LowRank.b", lambda t: t[:, :1].repeat(1, 1 << 15))


def lost(spoilt: Any) -> None:
    (spoilt.folder / "delta.safetensors").unlink()


def both(spoilt: Any) -> None:
    (spoilt.folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


BROKEN: Mapping[str, tuple[str, Callable[[Any], None], tuple[str, ...]]] = {
    "version": ("lora", key("deltaserve_delta", 1), ("deltaserve_delta", "1", "version 2")),
    "version-true": ("lora", key("deltaserve_delta", True), ("deltaserve_delta", "True")),
    "no-version": ("lora", config(lambda told: told.pop("deltaserve_delta")), ("deltaserve_delta",)),
    "unknown-key": ("lora", key("surprise", 1), ("surprise", "does not know")),
    "no-key": ("lora", config(lambda told: told.pop("at")), ("'at'",)),
    "not-json": ("lora", lambda s: (s.folder / "delta.json").write_text("{"), ("not JSON",)),
    "cut-config": ("lora", cut("delta.json"), ("delta.json", "not JSON")),
    "cut-tensors": ("lora", cut("delta.safetensors"), ("delta.safetensors",)),
    "huge-rank": ("lora", huge, ("LowRank.a", "32768", "16384")),
    "no-tensors": ("lora", lost, ("holds no delta.safetensors",)),
    "two-formats": ("lora", both, ("adapter_config.json and delta.json",)),
    "family": ("lora", key("family", "llama"), ("llama", "gpt2")),
    "kind": ("lora", key("kinds", ["magic"]), ("kinds", "magic")),
    "no-kinds": ("lora", key("kinds", []), ("kinds",)),
    "task": ("lora", key("task", "translation"), ("task", "translation")),
    "task-with-head": ("mood", key("task", "embedding"), ("task", "no head")),
    "task-without-head": ("lora", key("task", "sequence_classification"), ("task", "no head")),
    "pooling": ("mood", key("pooling", "mean"), ("pooling", "mean", "pooler")),
    "labels": ("mood", key("labels", ["a", "b"]), ("labels", "2", "3")),
    "surrogate": ("mood", key("labels", ["\ud800", "a", "b"]), ("labels",)),
    "problem": ("mood", key("problem_type", "guessing"), ("problem_type", "guessing")),
    "no-problem": ("mood", key("problem_type", None), ("problem_type",)),
    "shift": ("prefix", key("position_shift", 1 << 20), ("position_shift", "4")),
    "made-from": ("lora", config(lambda told: told["made_from"].pop("format")), ("made_from", "format")),
    "no-site": ("lora", config(moved_site), ("transformer.h.7.attn.c_attn", "not in this backbone")),
    "wrong-site": ("lora", config(other_site), ("LowRank", "norm")),
    "empty-site": ("lora", config(lambda told: next(iter(told["at"].values())).clear()), ("has nothing",)),
    "twice": ("lora", config(twice), ("two primitives",)),
    "nothing": ("lora", key("at", {}), ("no place for 4 tensors",)),
    "type": ("lora", field("LowRank", "type", "Magic"), ("Magic", "LowRank")),
    "prompt-at-site": ("lora", field("LowRank", "type", "SoftPrompt"), ("SoftPrompt", "field")),
    "unknown-field": ("lora", field("LowRank", "power", 2), ("power",)),
    "no-field": ("lora", config(lambda told: next(iter(told["at"].values()))[0].pop("b")), ("'b'",)),
    "scale-word": ("lora", field("LowRank", "scale", "1"), ("scale", "finite number")),
    "scale-nan": ("lora", field("LowRank", "scale", float("nan")), ("scale", "finite number")),
    "scale-huge": ("lora", field("LowRank", "scale", 1e39), ("scale", "finite number")),
    "missing-tensor": ("lora", field("LowRank", "a", "nowhere"), ("'nowhere'", "missing")),
    "name-number": ("lora", field("LowRank", "a", 5), ("'a'", "string")),
    "extra-tensor": ("lora", lambda s: s.tensors(lambda t: t.update(more=torch.ones(2))), ("1 tensors", "'more'")),
    "shape-a": ("lora", tensor("LowRank.a", lambda t: t[:, 1:]), ("LowRank.a", "[2, 15]", "[n, 16]")),
    "shape-b": ("lora", tensor("LowRank.b", lambda t: t[:, :1]), ("LowRank.b", "[48, 1]", "[48, 2]")),
    "rank-0": ("lora", tensor("LowRank.a", lambda t: t[:0]), ("LowRank.a", "[0, 16]")),
    "nan": ("lora", tensor("LowRank.a", put(3, float("nan"))), ("LowRank.a", "NaN")),
    "infinite": ("lora", tensor("LowRank.b", put(0, float("inf"))), ("LowRank.b", "NaN")),
    "float64": ("lora", tensor("LowRank.a", torch.Tensor.double), ("LowRank.a", "float64")),
    "integers": ("lora", tensor("LowRank.a", torch.Tensor.int), ("LowRank.a", "int32")),
    "unsorted-rows": ("tokens", tensor("Rows.index", lambda t: t.flip(0)), ("Rows.index", "sorted")),
    "rows-twice": ("tokens", tensor("Rows.index", put(1, 3)), ("Rows.index", "twice")),
    "rows-beyond": ("tokens", tensor("Rows.index", put(2, 40)), ("Rows.index", "0 to 39")),
    "rows-below": ("tokens", tensor("Rows.index", put(0, -1)), ("Rows.index", "0 to 39")),
    "rows-long": ("tokens", tensor("Rows.index", torch.Tensor.long), ("Rows.index", "int64")),
    "rows-values": ("tokens", tensor("Rows.values", lambda t: t[:2]), ("Rows.values", "[2, 16]", "[3, 16]")),
    "sparse-beyond": ("shira", tensor("Sparse.index", put(0, 16)), ("Sparse.index", "0 to 15")),
    "sparse-below": ("shira", tensor("Sparse.index", put(-1, -2)), ("Sparse.index", "0 to 15")),
    "sparse-count": ("shira", tensor("Sparse.values", lambda t: t[:-1]), ("Sparse.index", "[2, 63]")),
    "block-size": ("oft", tensor("Block.blocks", lambda t: t[:3]), ("Block.blocks", "[3, 4, 4]", "[16, 16]")),
    "block-square": ("oft", tensor("Block.blocks", lambda t: t[:, :, :2]), ("Block.blocks", "[4, 4, 2]")),
    "block-flag": ("oft", field("Block", "outputs", 1), ("outputs", "true or false")),
    "prefix-heads": ("prefix", tensor("Prefix.keys", lambda t: t[:, :1]), ("Prefix.keys", "[4, 1, 8]")),
    "prefix-lengths": (
        "prefix",
        lambda s: s.tensors(lambda t: t.update({n: x[:3] for n, x in t.items() if ".0." in n})),
        ("[3, 4] rows",),
    ),
    "prefix-too-long": (
        "prefix",
        lambda s: s.tensors(lambda t: t.update({n: torch.ones(32, 2, 8) + i for i, n in enumerate(sorted(t))})),
        ("32 rows", "no room"),
    ),
    "prefix-far": ("prefix", field("Prefix", "pre", 1 << 30), ("Prefix.pre",)),
    "prompt-width": ("prompt", tensor("SoftPrompt.rows", lambda t: t[:, :8]), ("rows", "[4, 8]", "[n, 16]")),
    "prompt-too-long": ("prompt", tensor("SoftPrompt.rows", lambda t: t.repeat(8, 1)), ("32 rows", "no room")),
    "norm-width": ("norms", tensor("Affine.scale", lambda t: t[1:]), ("Affine.scale", "[15]", "[16]")),
    "head-width": ("mood", tensor("HeadLayer.weight", lambda t: t[:, 1:]), ("head", "weight", "[3, 15]")),
    "head-bias": ("mood", tensor("HeadLayer.bias", lambda t: t[1:]), ("head", "bias", "[2]", "[3]")),
    "head-activation": (
        "mood",
        config(lambda told: told["head"][0].update(activation="glow")),
        ("head", "activation", "glow"),
    ),
    "head-layers": ("mood", config(lambda told: told["head"].append(told["head"][0])), ("entry 1", "weight")),
    "no-head": ("mood", key("head", None), ("task", "a head")),
    "base-twice": ("vera", config(lambda told: told["bases"].append(told["bases"][0])), ("bases", "twice")),
    "base-missing": ("vera", key("bases", ["base.0", "nowhere"]), ("'nowhere'", "missing")),
    "base-unused": ("vera", unused_base, ("bases", "no primitive")),
    "base-nan": ("vera", tensor("base.0", put(0, float("nan"))), ("base.0", "NaN")),
    "view-beyond": ("vera", field("LowRank", "b", view(0, [25, 3], [3, 1])), ("no part of 'base.1'", "[24, 3]")),
    "view-offset": ("vera", field("LowRank", "b", view(70, [16, 3], [3, 1])), ("no part of 'base.1'",)),
    "view-below": ("vera", field("LowRank", "b", view(-1, [16, 3], [3, 1])), ("no part of 'base.1'",)),
    "view-stride": ("vera", field("LowRank", "b", view(0, [16, 3], [3, 2])), ("no part of 'base.1'",)),
    "view-still": ("vera", field("LowRank", "b", view(0, [16, 3], [0, 1])), ("stride", "from 1")),
    "view-shape": ("vera", field("LowRank", "b", view(0, [16, 2], [3, 1])), ("LowRank.b", "[16, 2]", "[16, 3]")),
    "view-key": ("vera", field("LowRank", "b", {"base": "base.1"}), ("'b'", "an object of 1")),
    "inner": ("vera", tensor("LowRank.inner", lambda t: t[:2]), ("LowRank.inner", "[2]", "[3]")),
    "outer": ("vera", tensor("LowRank.outer", lambda t: t[:2]), ("LowRank.outer", "[2]")),
    "overflow": ("vera", overflown, ("not in float32",)),
    "invocation-range": ("alora", key("invocation", [5, 40]), ("invocation", "0 to 39")),
    "invocation-words": ("alora", key("invocation", ["x"]), ("invocation", "whole number")),
    "invocation-long": ("alora", key("invocation", [1] * 257), ("invocation", "256")),
    "invocation-prompt": ("prompt", key("invocation", [5]), ("invocation", "no prompt")),
    "invocation-prefix": ("prefix", key("invocation", [5]), ("invocation", "linear layers")),
    "task-id": ("lora", key("task_id", -1), ("task_id", "from 0")),
    "token-types": ("lora", key("token_types", "yes"), ("token_types", "true or false")),
    "hash-site": ("pissa", config(lambda told: told["weights"].update(nowhere={"weight": "0"})), ("nowhere",)),
    "hash-part": ("pissa", config(lambda told: next(iter(told["weights"].values())).update(x="0")), ("weights",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, made: Callable[..., Any]) -> None:
    kind, spoil, said = BROKEN[name]
    spoilt = made(kind)
    spoilt.read()
    spoil(spoilt)
    spoilt.refused(*said)


def test_sizes_are_those_of_the_file(made: Callable[..., Any]) -> None:
    """A header that claims more than the file has, and a config that is larger than one may be."""
    spoilt = made("lora")
    file = spoilt.folder / "delta.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for entry in header.values():
        if "shape" in entry:
            entry["shape"][0] = 1 << 40
    told = json.dumps(header).encode()
    file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + size :])
    spoilt.refused("delta.safetensors")
    (spoilt.folder / "delta.json").write_text(" " * (17 << 20))
    spoilt.refused("delta.json", "bytes")
