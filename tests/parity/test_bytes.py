"""What a delta of real size takes on the device: the bytes of what it was lowered to, and little for alignment."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from families import FAMILIES
from methods import Case, config
from reference import drawn

from deltaserve.backbone.load import load
from deltaserve.deltas.delta import Delta
from deltaserve.engine.loop import Engine, EngineSettings
from deltaserve.formats.registry import read
from deltaserve_client import Client

CLOSE = 0.05
SECONDS = 60
FAMILY = FAMILIES["bert"]
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
MANY = ("lora", "lora-patterns", "lora-bias-all", "dora", "vblora", "fourierft", "lora-tokens", "tokens")
MANY += ("ln-tuning", "ia3", "prefix", "prompt")
OWN = {
    "vera": lambda: peft.VeraConfig(r=256, target_modules=["query", "dense"], projection_prng_key=3),
    "vera-again": lambda: peft.VeraConfig(r=256, target_modules=["query", "dense"], projection_prng_key=3),
    "vera-drawn": lambda: peft.VeraConfig(
        r=256, target_modules=["query", "dense"], projection_prng_key=3, save_projection=False
    ),
    "vera-other": lambda: peft.VeraConfig(r=256, target_modules=["query", "dense"], projection_prng_key=4),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["query"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, r=0, target_modules=["query", "dense"]),
    "shira": lambda: peft.ShiraConfig(r=8, target_modules=["query"]),
    "beft": lambda: peft.BeftConfig(target_modules=["query", "value"]),
}
SHARING = ("vera", "vera-again", "vera-drawn")
"""Those with one base."""
HALVES = ("lora", "ia3", "prefix")
"""Those whose checkpoints are also tried in bfloat16."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`backbone`, a layer of BERT-base, and `deltas/<name>`."""
    place = tmp_path_factory.mktemp("bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = FAMILY.config().to_dict() | SIZES
        model = transformers.BertModel(transformers.BertConfig(**sizes))
        model.save_pretrained(place / "backbone")
        for name in (*MANY, *OWN, *(f"{name}-half" for name in HALVES)):
            plain = name.removesuffix("-half")
            told = OWN[plain]() if plain in OWN else config(Case("bert", plain, FAMILY.task))
            told.task_type = FAMILY.task
            made = peft.get_peft_model(transformers.BertModel.from_pretrained(place / "backbone"), told)
            drawn(made, list(OWN).index(name) if name in OWN else 1, trainable=True)
            made = made.to(torch.bfloat16) if plain != name else made
            made.save_pretrained(place / "deltas" / name)
    return place


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    backbone = load(str(folder / "backbone"), dtype="float32", device="cpu")

    def never(key: int) -> Delta:
        raise AssertionError(f"{key} was evicted")

    started = Engine(backbone, EngineSettings(pool_bytes=128 << 20, kv_bytes=1 << 20, threads=1), never)
    started.start()
    yield started
    started.drain(0)


def test_device_bytes_are_those_of_the_primitives(folder: Path, engine: Engine) -> None:
    off, kinds, bases = {}, set(), set()
    for key, place in enumerate(sorted((folder / "deltas").iterdir())):
        delta = read(place, engine.backbone.spec, engine.backbone.weights)
        before = engine.stats().pool_used_bytes
        told = engine.publish(key, delta, place.name).result(SECONDS)
        shared = 0 if delta.bases.keys() <= bases else engine.shared_bytes(delta)
        assert told + shared == engine.stats().pool_used_bytes - before
        bases |= delta.bases.keys()
        kinds |= {type(one) for primitives in delta.at.values() for one in primitives}
        if not delta.nbytes <= told <= (1 + CLOSE) * delta.nbytes:
            off[place.name] = f"{told} bytes for {delta.nbytes}"
    assert not off
    assert len(kinds) >= 6


def test_a_base_takes_its_bytes_once(folder: Path, engine: Engine) -> None:
    used, matrix = [0], 4 * 256 * (768 + 3072)
    assert len({(folder / "deltas" / name / "adapter_model.safetensors").read_bytes() for name in SHARING}) == 3
    for key, name in enumerate((*SHARING, "vera-other")):
        delta = read(folder / "deltas" / name, engine.backbone.spec, engine.backbone.weights)
        assert engine.shared_bytes(delta) == delta.shared_bytes >= matrix
        assert engine.publish(key, delta, name).result(SECONDS) < delta.shared_bytes / 50
        used.append(engine.stats().pool_used_bytes)
    own = used[2] - used[1]
    assert [after - before for before, after in itertools.pairwise(used)] == [
        own + delta.shared_bytes, own, own, own + delta.shared_bytes
    ]  # fmt: skip
    freed = [engine.retire(key).result(SECONDS) for key in range(4)]
    assert freed == [own, own, own + delta.shared_bytes, own + delta.shared_bytes]
    assert engine.stats().pool_used_bytes == 0


def test_half_a_file_takes_half_the_device(folder: Path, engine: Engine) -> None:
    for name in HALVES:
        whole, half = (
            read(folder / "deltas" / f"{name}{end}", engine.backbone.spec, engine.backbone.weights)
            for end in ("", "-half")
        )
        assert half.nbytes == whole.nbytes / 2


def test_server_tells_the_bytes(folder: Path, start: Any) -> None:
    """Through LoadDelta and GetDelta."""
    running = start(folder / "backbone", delta_root=folder / "deltas", pool_bytes=128 << 20)
    backbone = load(str(folder / "backbone"), dtype="float32", device="cpu")
    with Client(running.address) as client:
        for name in (*MANY, "vera"):
            delta = read(folder / "deltas" / name, backbone.spec, backbone.weights)
            client.deltas.load(name, name, timeout=SECONDS)
            found = client.deltas.get(name, timeout=SECONDS)
            assert delta.nbytes <= found.device_bytes <= (1 + CLOSE) * delta.nbytes
            assert found.file_bytes == (folder / "deltas" / name / "adapter_model.safetensors").stat().st_size
    running.stop()
