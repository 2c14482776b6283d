"""Where sublayers begin and end: what the table says of each family, on plain transformers' own forward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deltaserve.backbone.load import load
from deltaserve.deltas.sites import Part, SiteType, Sublayer
from deltaserve_kernels.testing import error_ratio

SAME = 1e-6
SIZES: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 66}
SIZES |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("Roberta", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 6, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-post": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "gpt-neox": ("GPTNeoX", {}),
}
"""Families that tests/server/conftest.py has no model of: transformers' word, and what differs in the config."""
HERE = ("t5", "t5-gated", "bert", "modernbert", "gpt2", "llama")
POST = {"bert", "roberta", "opt-post"}
SANDWICHED = {"gemma2", "gemma3"}
NAMES = sorted({*HERE, *MORE} - {"gpt-neox"})


@pytest.fixture(scope="module")
def folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name in HERE:
            return tiny(name)
        if name not in made:
            word, changed = MORE[name]
            torch.manual_seed(5)
            auto = transformers.AutoModel if name == "roberta" else transformers.AutoModelForCausalLM
            model = auto.from_config(getattr(transformers, f"{word}Config")(**SIZES | changed))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.15)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return find


@dataclass(eq=False)
class Seen:
    """What each module got and gave in one forward."""

    got: dict[str, torch.Tensor] = field(default_factory=dict)
    gave: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            self.got[name], self.gave[name] = args[0].flatten(0, -2), y.flatten(0, -2)

        module.register_forward_hook(hook)


def stacks(sublayers: tuple[Sublayer, ...]) -> Iterator[list[Sublayer]]:
    for _, members in groupby(sublayers, lambda s: s.decoder):
        yield list(members)


@pytest.mark.parametrize("name", NAMES)
def test_sublayers_are_what_the_models_own_forward_does(name: str, folder: Callable[[str], Path]):
    spec = load(str(folder(name)), dtype="float32", device="cpu").spec
    auto = "AutoModelForSeq2SeqLM" if name.startswith("t5") else "AutoModel"
    model = getattr(transformers, auto).from_pretrained(folder(name), attn_implementation="eager").eval()
    start = spec.prefix + "."
    modules = {n if not spec.prefix or auto != "AutoModel" else start + n: m for n, m in model.named_modules() if n}
    seen = Seen()
    for sublayer in spec.sublayers:
        for site in {*sublayer.first, sublayer.last, sublayer.norm, sublayer.sandwich} - {None}:
            seen.watch(site, modules[site])
    ids = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids[:, :4]} if name.startswith("t5") else {}))

    for members in stacks(spec.sublayers):
        for s, behind in pairwise([*members, None]):
            stream = seen.got[s.norm] if not s.post else seen.got[s.first[0]]
            h = seen.gave[s.last if s.sandwich is None else s.sandwich]
            for site in s.first:
                assert torch.equal(seen.got[site], stream if s.post else seen.gave[s.norm])
            if s.sandwich is not None:
                assert torch.equal(seen.got[s.sandwich], seen.gave[s.last])
            if s.post:
                assert error_ratio(seen.got[s.norm], stream + h) <= SAME
            if behind is not None:
                after = seen.gave[s.norm] if s.post else stream + h
                assert error_ratio(seen.got[behind.first[0] if s.post else behind.norm], after) <= SAME


@pytest.mark.parametrize("name", NAMES)
def test_sublayers_stand_at_sites_of_one_axis(name: str, folder: Callable[[str], Path]):
    spec = load(str(folder(name)), dtype="float32", device="cpu").spec
    linears = {SiteType.LINEAR, SiteType.CONV1D}
    assert spec.sublayers
    for s in spec.sublayers:
        last = spec.sites[s.last]
        assert s.first and all(spec.sites[f].type in linears and spec.sites[f].axis is last.axis for f in s.first)
        assert last.type in linears and last.out_features == spec.hidden_size
        norms = [s.norm, *([] if s.sandwich is None else [s.sandwich])]
        if s.norm == "model.layers.0.attn_norm":
            assert s.norm in spec.modules and s.norm not in spec.sites, "ModernBERT's first norm is an Identity"
            continue
        assert all(spec.sites[n].type is SiteType.NORM and spec.sites[n].axis is last.axis for n in norms)
    assert {s.post for s in spec.sublayers} == {name in POST}
    assert all((s.sandwich is not None) == (name in SANDWICHED) for s in spec.sublayers)


def test_layers_are_counted_through_both_stacks(folder: Callable[[str], Path]):
    found = load(str(folder("t5-gated")), dtype="float32", device="cpu").spec.sublayers
    attention, cross, feeding = Part.ATTENTION, Part.CROSS_ATTENTION, Part.FEED_FORWARD
    parts = [(s.layer, s.decoder, s.part) for s in found]
    encoder = [(layer, False, part) for layer in range(3) for part in (attention, feeding)]
    assert parts == encoder + [(layer, True, part) for layer in (3, 4) for part in (attention, cross, feeding)]
    assert found[1].first == (
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
    )
    assert found[-2].first == ("decoder.block.1.layer.1.EncDecAttention.q",)


def test_a_parallel_residual_has_no_sublayers(folder: Callable[[str], Path]):
    assert load(str(folder("gpt-neox")), dtype="float32", device="cpu").spec.sublayers == ()
