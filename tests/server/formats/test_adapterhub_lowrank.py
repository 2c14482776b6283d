"""AdapterHub's LoRA and its kin: what a linear gives with them is what the library's equations say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import LORA, SEQ, STARTS, Draw, Made, Reading, Stream, Tensors, bottlenecks
from torch.nn.functional import linear

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.adapters import Bottleneck
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Affine, LowRank
from deltaserve.deltas.sites import Site
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve_kernels.testing import error_ratio

EXACT = 1e-5
Library = Callable[[Tensors, str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tensors, name below which they stand, rows, the backbone's weight, what it gives) -> what the library gives."""

LINEARS: Mapping[str, tuple[str, ...]] = {
    "bert": ("encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"),
    "llama": ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"),
    "t5": ("encoder.block.1.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.v"),
}
EVERY: Mapping[str, tuple[str, ...]] = {
    "bert": tuple(f"encoder.layer.{i}.attention.self.{w}" for i in range(2) for w in ("query", "value")),
    "llama": tuple(f"layers.{i}.self_attn.{w}_proj" for i in range(2) for w in "qv"),
    "t5": (
        *(f"encoder.block.{i}.layer.0.SelfAttention.{w}" for i in range(2) for w in "qv"),
        *(f"decoder.block.{i}.layer.{n}Attention.{w}" for i in range(2) for n in ("0.Self", "1.EncDec") for w in "qv"),
    ),
    "gemma2": tuple(f"layers.{i}.self_attn.{w}_proj" for i in range(2) for w in "qv"),
}
"""Linears that `selfattn_lora` with q and v means."""


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


def site_of(backbone: Backbone, family: str, linear_name: str) -> Site:
    return backbone.spec.sites[STARTS[family] + linear_name]


def given(delta: Delta, site: Site, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What a linear gives with what a delta has there."""
    y = base
    for one in sorted(
        delta.at[site.name], key=lambda one: (Bottleneck, Affine, LowRank).index(type(one)), reverse=True
    ):
        match one:
            case LowRank(a, b, scale, inner, outer):
                z = x @ a.float().T
                if inner is not None:
                    z = z @ inner.T if inner.ndim == 2 else z * inner
                z = scale * (z @ b.float().T)
                y = y + (z if outer is None else z * outer)
            case Affine(None, by, shift):
                y = (y if by is None else y * by) + (0 if shift is None else shift)
            case Bottleneck():
                stream = Stream(y, y, x, lambda z: z)
                y = stream.after((one,))
            case other:
                raise AssertionError(other)
    return y


def compare(made: Made, delta: Delta, backbone: Backbone, names: tuple[str, ...], library: Library) -> None:
    for name in names:
        site = site_of(backbone, made.family, name)
        x = Draw(5)(4, site.in_features)
        weight = backbone.weights(site.name)
        base = linear(x, weight, site.bias)
        wanted = library(made.tensors, f"{name}.loras.{made.name}", x, weight, base)
        assert error_ratio(given(delta, site, x, base), wanted) < EXACT, name
        assert error_ratio(wanted, base) > 1e-3, name


More = Callable[[Tensors, str, Site, Draw], None]
"""Adds to or takes from the tensors of one linear."""


def low_rank(told: Mapping[str, Any], backbone: Backbone, family: str, more: More | None = None) -> Tensors:
    draw, made = Draw(), Tensors()
    for at in EVERY[family]:
        site = site_of(backbone, family, at)
        module = f"{at}.loras.a"
        made[f"{module}.lora_A"], made[f"{module}.lora_B"] = (
            draw(told["r"], site.in_features),
            draw(site.out_features, told["r"]),
        )
        if more is not None:
            more(made, module, site, draw)
    return made


def lora(scale: float) -> Library:
    return lambda t, at, x, _, base: base + scale * (x @ t[f"{at}.lora_A"].T) @ t[f"{at}.lora_B"].T


@pytest.mark.parametrize("family", LINEARS)
def test_lora(family: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    made = Made(LORA, low_rank(LORA, backbones[family], family), family)
    delta = reading(made)
    compare(made, delta, backbones[family], EVERY[family], lora(2.0))
    assert delta.kinds == ("lora",) and len(delta.at) == len(EVERY[family])


@pytest.mark.parametrize(
    ("version", "scale"), [("adapters.1.0.1", 1.0), ("adapters.0.2.0", 1.0), ("adapters.1.1.0", 2.0), ("3.2.1", 2.0)]
)
def test_scale_of_an_older_library(
    version: str, scale: float, reading: Reading, backbones: Mapping[str, Backbone]
) -> None:
    made = Made(LORA, low_rank(LORA, backbones["bert"], "bert"), known={"version": version})
    compare(made, reading(made), backbones["bert"], LINEARS["bert"], lora(scale))


def magnitude(made: Tensors, at: str, site: Site, draw: Draw) -> None:
    made[f"{at}.m.weight"] = 2 + draw(site.out_features, 1)


@pytest.mark.parametrize("family", LINEARS)
def test_dora_scales_the_bias_too(family: str, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "use_dora": True}
    made = Made(told, low_rank(told, backbones[family], family, magnitude), family)

    def library(t: Tensors, at: str, x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        norm = (weight + t[f"{at}.lora_B"] @ t[f"{at}.lora_A"]).norm(dim=1)
        return t[f"{at}.m.weight"].squeeze(1) / norm * lora(2.0)(t, at, x, weight, base)

    delta = reading(made)
    compare(made, delta, backbones[family], EVERY[family], library)
    assert delta.kinds == ("lora", "dora")


def gate(made: Tensors, at: str, site: Site, draw: Draw) -> None:
    made |= draw.linear(f"{at}.gate", site.in_features, 1)


def gated(t: Tensors, at: str, x: torch.Tensor, _: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    by = torch.sigmoid(linear(x, t[f"{at}.gate.weight"], t[f"{at}.gate.bias"])).mean(0)
    return base + by * (x @ t[f"{at}.lora_A"].T) @ t[f"{at}.lora_B"].T


def test_gated_lora_has_no_scale(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "use_gating": True}
    made = Made(told, low_rank(told, backbones["bert"], "bert", gate))
    compare(made, reading(made), backbones["bert"], EVERY["bert"], gated)


def test_gated_dora(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "use_gating": True, "use_dora": True}

    def more(made: Tensors, at: str, site: Site, draw: Draw) -> None:
        magnitude(made, at, site, draw)
        gate(made, at, site, draw)

    made = Made(told, low_rank(told, backbones["bert"], "bert", more))

    def library(t: Tensors, at: str, x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        norm = (weight + t[f"{at}.lora_B"] @ t[f"{at}.lora_A"]).norm(dim=1)
        return t[f"{at}.m.weight"].squeeze(1) / norm * gated(t, at, x, weight, base)

    compare(made, reading(made), backbones["bert"], EVERY["bert"], library)


def test_ia3(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "r": 1, "alpha": 2, "composition_mode": "scale", "intermediate_lora": True}
    places = EVERY["bert"] + tuple(f"encoder.layer.{i}.intermediate.dense" for i in range(2))
    draw = Draw()
    tensors = {
        f"{at}.loras.a.lora_B": 1 + draw(site_of(backbones["bert"], "bert", at).out_features, 1) for at in places
    }
    made = Made(told, tensors)
    delta = reading(made)
    compare(made, delta, backbones["bert"], places, lambda t, at, x, w, base: base * 2 * t[f"{at}.lora_B"].squeeze(1))
    assert delta.kinds == ("ia3",)


FEEDING: Mapping[str, tuple[str, str]] = {
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "gpt2": ("h.{}.mlp.c_fc", "h.{}.mlp.c_proj"),
    "llama": ("layers.{}.mlp.down_proj", "layers.{}.mlp.up_proj"),
    "gemma2": ("layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"),
    "modernbert": ("layers.{}.mlp.Wi", "layers.{}.mlp.Wo"),
}
"""What intermediate_lora and output_lora mean: in Llama, the one is called as the other is meant."""


@pytest.mark.parametrize("family", FEEDING)
@pytest.mark.parametrize("which", [0, 1])
def test_feed_forward(family: str, which: int, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "selfattn_lora": False, ("intermediate_lora", "output_lora")[which]: True, "leave_out": [1]}
    at = FEEDING[family][which].format(0)
    site = site_of(backbones[family], family, at)
    draw = Draw()
    pair = {f"{at}.loras.a.lora_A": draw(3, site.in_features), f"{at}.loras.a.lora_B": draw(site.out_features, 3)}
    made = Made(told, pair, family)
    compare(made, reading(made), backbones[family], (at,), lora(2.0))
    reading.refused(Made(told, {}, family), "is missing")


@pytest.mark.parametrize("matrices", [["q", "v"], ["v"], ["q", "k", "v"], ["k", "v"]])
@pytest.mark.parametrize("family", ["gpt2", "modernbert"])
def test_queries_keys_and_values_in_one(
    matrices: list[str], family: str, reading: Reading, backbones: Mapping[str, Backbone]
) -> None:
    told = {**LORA, "attn_matrices": matrices, "leave_out": [1]}
    at, n, draw = {"gpt2": "h.0.attn.c_attn", "modernbert": "layers.0.attn.Wqkv"}[family], len(matrices), Draw()
    third = site_of(backbones[family], family, at).out_features // 3
    made = Made(told, {f"{at}.loras.a.lora_A": draw(3 * n, 16), f"{at}.loras.a.lora_B": draw(third * n, 3)}, family)

    def library(t: Tensors, at: str, x: torch.Tensor, _: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = base.clone()
        for j, matrix in enumerate([m for m in "qkv" if m in matrices]):
            a, b = t[f"{at}.lora_A"][3 * j : 3 * j + 3], t[f"{at}.lora_B"][third * j : third * (j + 1)]
            w = "qkv".index(matrix)
            y[:, third * w : third * (w + 1)] += 2.0 * (x @ a.T) @ b.T
        return y

    compare(made, reading(made), backbones[family], (at,), library)


def test_ia3_of_a_merged_linear_multiplies_all_of_it(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "r": 1, "alpha": 3, "composition_mode": "scale", "attn_matrices": ["k", "v"], "leave_out": [1]}
    at = "h.0.attn.c_attn"
    made = Made(told, {f"{at}.loras.a.lora_B": 1 + Draw()(32, 1)}, "gpt2")

    def library(t: Tensors, at: str, x: torch.Tensor, _: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return base * 3 * torch.cat((torch.ones(16), t[f"{at}.lora_B"].squeeze(1)))

    compare(made, reading(made), backbones["gpt2"], (at,), library)


def test_gated_merged_linear_on_an_encoder(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "use_gating": True, "leave_out": [1]}
    at, draw = "layers.0.attn.Wqkv", Draw()
    tensors = {f"{at}.loras.a.lora_A": draw(6, 16), f"{at}.loras.a.lora_B": draw(32, 3)}
    made = Made(told, {**tensors, **draw.linear(f"{at}.loras.a.gate", 16, 2)}, "modernbert")

    def library(t: Tensors, at: str, x: torch.Tensor, _: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        g = torch.sigmoid(linear(x, t[f"{at}.gate.weight"], t[f"{at}.gate.bias"])).mean(0)
        y = base.clone()
        for j, third in enumerate((0, 2)):
            b = t[f"{at}.lora_B"][16 * j : 16 * j + 16]
            y[:, 16 * third : 16 * third + 16] += g[j] * (x @ t[f"{at}.lora_A"][3 * j : 3 * j + 3].T) @ b.T
        return y

    compare(made, reading(made), backbones["modernbert"], (at,), library)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_vera(diagonal: bool, dora: bool, reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    """Its matrices are full ones in the file, mostly diagonal; what all layers share is a base of the delta."""
    told = {**LORA, "vera_d": 0.1, "vera_b": 0.0, "use_dora": dora}

    def more(made: Tensors, at: str, site: Site, draw: Draw) -> None:
        del made[f"{at}.lora_A"], made[f"{at}.lora_B"]
        made[f"{at}.vera_D"], made[f"{at}.vera_B"] = draw(3, 3), draw(16, 16)
        if diagonal:
            for word in ("D", "B"):
                made[f"{at}.vera_{word}"] = made[f"{at}.vera_{word}"].diagonal().diag()
        if dora:
            magnitude(made, at, site, draw)

    shared = {"shared_parameters.a.lora_A": Draw(1)(3, 16), "shared_parameters.a.lora_B": Draw(2)(16, 3)}
    made = Made(told, low_rank(told, backbones["bert"], "bert", more) | shared)

    def library(t: Tensors, at: str, x: torch.Tensor, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        a, b = (t[f"shared_parameters.a.lora_{word}"] for word in "AB")
        change = t[f"{at}.vera_B"] @ b @ t[f"{at}.vera_D"] @ a
        y = base + 2.0 * x @ change.T
        return y * t[f"{at}.m.weight"].squeeze(1) / (weight + change).norm(dim=1) if dora else y

    delta = reading(made)
    compare(made, delta, backbones["bert"], EVERY["bert"], library)
    assert len(delta.bases) == (2 if diagonal else 1) and delta.kinds == (("dora",) if dora else ()) + ("vera",)
    reading.refused(
        Made(told, low_rank(told, backbones["bert"], "bert", more)),
        "save it from T5AdapterModel",
        error=FailedPrecondition,
    )


def test_mtl_lora(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {**LORA, "architecture": "mtl_lora", "n_up_projection": 3, "weights_sharpness": 0.5}

    def more(made: Tensors, at: str, site: Site, draw: Draw) -> None:
        made[f"{at}.lora_B"] = draw(3, site.out_features, 3)
        made[f"{at}.weights"], made[f"{at}.task_specific.values"] = draw(3), draw(3)

    made = Made(told, low_rank(told, backbones["bert"], "bert", more))

    def library(t: Tensors, at: str, x: torch.Tensor, _: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        w = (t[f"{at}.weights"] / 0.5).exp()
        z = x @ t[f"{at}.lora_A"].T * t[f"{at}.task_specific.values"]
        return base + 2.0 * sum(w[i] / w.sum() * z @ t[f"{at}.lora_B"][i].T for i in range(3))

    delta = reading(made)
    compare(made, delta, backbones["bert"], EVERY["bert"], library)
    assert delta.kinds == ("mtl-lora",)


def test_union(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    told = {"architecture": "union", "configs": [LORA, SEQ]}
    tensors = low_rank(LORA, backbones["bert"], "bert") | bottlenecks(SEQ)
    delta = reading(Made(told, tensors))
    assert delta.kinds == ("lora", "adapter") and len(delta.at) == 6
    compare(Made(LORA, tensors), delta, backbones["bert"], EVERY["bert"], lora(2.0))
    twice = {"architecture": "union", "configs": [LORA, {**LORA, "alpha": 1}]}
    reading.refused(Made(twice, tensors), "two parts of the config", "loras.a")


def test_a_place_that_no_key_means_is_known_by_its_name(reading: Reading, backbones: Mapping[str, Backbone]) -> None:
    """Which linear a key means has changed between the library's families; its tensors say where they were."""
    told = {**LORA, "selfattn_lora": False, "leave_out": [1]}
    at, draw = "layers.0.self_attn.o_proj", Draw()
    made = Made(told, {f"{at}.loras.a.lora_A": draw(3, 16), f"{at}.loras.a.lora_B": draw(16, 3)}, "llama")
    compare(made, reading(made), backbones["llama"], (at,), lora(2.0))


REFUSED: tuple[tuple[str, Mapping[str, Any], str, type[Exception]], ...] = (
    ("gpt2", {"use_dora": True}, "merged", FailedPrecondition),
    ("gpt2", {"vera_d": 0.1}, "merged", FailedPrecondition),
    ("gpt2", {"use_gating": True}, "no cache", FailedPrecondition),
    ("gpt2", {"architecture": "mtl_lora"}, "merged", FailedPrecondition),
    (
        "bert",
        {"architecture": "mtl_lora", "task_specific_matrix_type": "linear"},
        "singular_values",
        FailedPrecondition,
    ),
    ("bert", {"composition_mode": "scale", "r": 1, "use_gating": True}, "a gate on a vector", FailedPrecondition),
    ("bert", {"composition_mode": "scale", "r": 2}, "'r' is 2", BadCheckpoint),
    ("bert", {"composition_mode": "other"}, "'composition_mode' is 'other'", BadCheckpoint),
    ("bert", {"alpha": "much"}, "'alpha'", BadCheckpoint),
    ("bert", {"alpha": float("nan")}, "'alpha'", BadCheckpoint),
    ("bert", {"r": 1 << 40}, "'r' is", BadCheckpoint),
    ("bert", {"attn_matrices": 3}, "'attn_matrices' is 3", BadCheckpoint),
    ("bert", {"leave_out": "0"}, "'leave_out' is '0'", BadCheckpoint),
    ("gemma2", {"architecture": "mtl_lora"}, "does not have this method there", FailedPrecondition),
)


@pytest.mark.parametrize(("family", "changes", "said", "error"), REFUSED)
def test_refusals(family: str, changes: Any, said: str, error: Any, reading: Reading, backbones: Any) -> None:
    told = {**LORA, **changes}
    tensors = low_rank(LORA, backbones[family], family) if family in EVERY else Tensors()
    reading.refused(Made(told, tensors, family), said, error=error)
