"""What lowering costs is told before it is done, and told right: an operator's limit is compared with it."""

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from deltaserve.app.patience import Patience
from deltaserve.backbone.load import load
from deltaserve.backbone.model import Backbone
from deltaserve.errors import FailedPrecondition
from deltaserve.formats import speed
from deltaserve.formats.folder import Folder
from deltaserve.formats.peft import costs
from deltaserve.formats.peft.checkpoint import Checkpoint
from deltaserve.formats.peft.types import TYPES
from deltaserve.formats.registry import read
from deltaserve.formats.speed import Cost
from deltaserve.formats.wanted import NOTHING_WANTED
from deltaserve.formats.work import Work

FACTOR = 4.0
"""How far an estimate may be off: what memory costs differs most."""
LEAST = 0.05
"""Seconds below which what an estimate leaves out, opening files for one, counts too much."""
TARGETS = ["q_proj", "up_proj", "down_proj"]


def tuner(word: str, **told: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, f"{word}Config")(task_type="CAUSAL_LM", **{"target_modules": TARGETS} | told)


METHODS: Mapping[str, Callable[[], Any]] = {
    "pissa": tuner("Lora", init_lora_weights="pissa", r=16),
    "olora": tuner("Lora", init_lora_weights="olora", r=16),
    "dora": tuner("Lora", use_dora=True, r=16),
    "hra": tuner("HRA", r=16),
    "miss-bat": tuner("Miss", r=16, init_weights="bat"),
    "loha": tuner("LoHa", r=32),
    "lokr": tuner("LoKr", r=8),
    "c3a": tuner("C3A", block_size=256),
    "hira": tuner("Hira", r=32),
    "randlora": tuner("RandLora", r=32),
    "frod": tuner("Frod", sparse_rate=0.01, progressbar=False),
    "fourierft": tuner("FourierFT", n_frequency=1000),
    "waveft": tuner("WaveFT", n_frequency=2592),
    "psoft": tuner("Psoft", r=32),
    "psoft-lowrank": tuner("Psoft", r=32, psoft_svd="lowrank", psoft_svd_lowrank_niter=40),
    "supertuning-chosen-again": tuner("Supertuning", sparsity=0.99, save_precomputed_indices=False),
    "osf": tuner("OSF"),
    "deft-qr": tuner("Deft", r=16, decomposition_method="qr"),
    "peanut": tuner("Peanut", r=32, depth=2),
    "glora": tuner("Glora", r=8),
    "oft": tuner("OFT", oft_block_size=128, r=0),
    "oft-cayley": tuner("OFT", oft_block_size=128, r=0, use_cayley_neumann=False),
    "boft": tuner("BOFT", boft_block_size=128),
    "tinylora": tuner("TinyLora", r=16, u=1024, save_projection=False),
}
CHEAP: Mapping[str, Callable[[], Any]] = {
    "lora": tuner("Lora", r=4),
    "ia3": tuner("IA3", feedforward_modules=["down_proj"]),
    "vera": tuner("Vera", r=8),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


class Layer:
    """A llama of one layer, so wide, and checkpoints for it."""

    def __init__(self, width: int, folder: Path) -> None:
        self._folder = folder
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.LlamaForCausalLM(config).save_pretrained(folder / "backbone")
            self.backbone: Backbone = load(str(folder / "backbone"), dtype="float32", device="cpu")

    def written(self, name: str, config: Callable[[], Any]) -> Path:
        place = self._folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = peft.get_peft_model(
                transformers.LlamaForCausalLM.from_pretrained(self._folder / "backbone", dtype=torch.float32), config()
            )
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.02)
            made.save_pretrained(place)
        return place

    def cost(self, place: Path) -> Cost:
        folder = Folder(place)
        config = folder.config()
        dotted = TYPES[config["peft_type"]].dotted
        return costs.of(Checkpoint(folder, config, self.backbone.spec, NOTHING_WANTED, dotted))

    def read(self, place: Path, work: Work) -> float:
        """Seconds of this thread."""
        start = time.thread_time()
        read(place, self.backbone.spec, self.backbone.weights, work=work)
        return time.thread_time() - start


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(768, tmp_path_factory.mktemp("layer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(256, tmp_path_factory.mktemp("small"))


def compared(layer: Layer, names: Mapping[str, Callable[[], Any]]) -> int:
    """How many were slow enough to compare."""
    off, slow = {}, 0
    for name, config in names.items():
        place = layer.written(name, config)
        told = layer.cost(place).seconds
        took = min(layer.read(place, Work()) for _ in range(2))
        if max(told, took) > LEAST:
            slow += 1
            if not took / FACTOR <= told <= took * FACTOR:
                off[name] = f"told {told:.3f} s, took {took:.3f} s"
    assert not off
    return slow


@pytest.mark.timeout(300)
def test_estimates_are_near(layer: Layer) -> None:
    assert compared(layer, METHODS) >= 6


@pytest.mark.long
@pytest.mark.timeout(600)
def test_estimates_are_near_at_a_larger_width(tmp_path: Path) -> None:
    """Where a weight's numbers no longer fit a cache."""
    names = {name: config for name, config in METHODS.items() if name not in ("psoft", "osf", "frod")}
    assert compared(Layer(2048, tmp_path), names) >= 12


@pytest.mark.parametrize("name", CHEAP)
def test_what_computes_nothing_costs_nothing(small: Layer, name: str) -> None:
    place = small.written(name, CHEAP[name])
    assert small.cost(place) == Cost() and Cost().seconds == 0.0
    small.read(place, Work(seconds=0))


@pytest.mark.parametrize("name", METHODS)
def test_a_limit_is_a_limit(small: Layer, name: str) -> None:
    """Above the estimate it is lowered; at 0 it is refused, before a tensor is read, with what to do instead."""
    place = small.written(name, METHODS[name])
    seconds = small.cost(place).seconds
    assert 0 < seconds < 30
    small.read(place, Work(seconds=seconds * 1.01))
    for limit in (0.0, seconds * 0.99):
        with pytest.raises(FailedPrecondition) as refused:
            small.read(place, Work(seconds=limit, command="deltaserve convert here there"))
        assert refused.value.reason == "LOWERING_TOO_LONG"
        assert "--lowering-seconds" in refused.value.message
        assert "`deltaserve convert here there`" in refused.value.message
        assert float(refused.value.metadata["seconds"]) == pytest.approx(seconds, rel=0.01)
        assert str(place) not in refused.value.message


def test_the_estimate_stays(small: Layer) -> None:
    """A delta that was evicted is read again under the same limit."""
    place = small.written("again", METHODS["pissa"])
    before = speed.rates()
    assert len({small.cost(place).seconds for _ in range(3)}) == 1
    assert speed.rates() is before and min(before.values()) > 0


def test_costs_grow_with_what_is_targeted(small: Layer) -> None:
    one, all_ = (
        small.cost(small.written(f"targets-{len(names)}", tuner("Hira", r=8, target_modules=names))).seconds
        for names in (["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    assert all_ == pytest.approx(4 * one)


@pytest.mark.parametrize("name", ["pissa", "hira", "osf"])
def test_progress_is_told(small: Layer, name: str) -> None:
    place = small.written(f"progress-{name}", METHODS[name])
    told: list[tuple[int, int]] = []
    small.read(place, Work(told=lambda done, total: told.append((done, total))))
    assert told == [(done, 3) for done in range(4)]


def test_patience() -> None:
    said: list[dict[str, int]] = []
    silent = Patience(lambda **words: said.append(words), every=60)
    for done in range(5):
        silent.tell(done, 5)
    assert not said
    Patience(lambda **words: said.append(words), every=0).tell(2, 5)
    assert said == [{"done": 2, "total": 5}]
