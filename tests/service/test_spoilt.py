"""What is wrong with a checkpoint is told to who loads it; all others' requests run on, and nothing of it is left."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve_protos.v1 import inference_pb2 as pb

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE = r"(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*z"
NORM = "base_model.model.model.norm.weight"
TOKENS = 150
ASKED = {"inputs": [pb.Input(ids=[5, 6, 7, 8])], "sampling": pb.Sampling(max_new_tokens=TOKENS, ignore_eos=True)}
WHO: tuple[dict[str, Any], ...] = ({"deltas": ["lora"]}, {"backbone": True})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return spoil


def config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


SPOILT: tuple[tuple[str, Callable[[Path], None], str, str], ...] = (
    # what, how, the reason, what the message names
    ("a missing tensor", tensors(lambda t: t.pop(A)), "BAD_CHECKPOINT", "q_proj.lora_A.weight' is missing"),
    ("an extra one", tensors(lambda t: t.update({f"{A}.more": torch.ones(1)})), "TENSORS_LEFT_OVER", "weight.more"),
    ("a wrong shape", tensors(lambda t: t.update({A: torch.ones(4, 31)})), "BAD_CHECKPOINT", "has shape [4, 31]"),
    ("another backbone", config(target_modules=["c_attn"]), "BAD_CHECKPOINT", "made for another one"),
    ("NaN", tensors(lambda t: t[A].fill_(float("nan"))), "BAD_CHECKPOINT", "lora_A.weight' holds NaN"),
    ("an unknown type", config(peft_type="TOMORROW"), "KIND_NOT_SERVED", "'peft_type' is 'TOMORROW'"),
    ("an unknown option", config(of_tomorrow=3), "OPTION_NOT_SERVED", "'of_tomorrow' is 3"),
    ("a huge rank", config(r=1 << 40), "BAD_CHECKPOINT", "'r' is 1099511627776"),
    ("a rank that fits no tensor", config(r=1 << 14), "BAD_CHECKPOINT", "make it [16384, 32]"),
    ("a truncated file", cut, "BAD_CHECKPOINT", "adapter_model.safetensors"),
    ("a path", config(target_modules="/etc/passwd"), "BAD_CHECKPOINT", "target_modules '/etc/passwd'"),
    ("a URL", config(target_modules=["http://127.0.0.1:9/x"]), "BAD_CHECKPOINT", "http://127.0.0.1:9/x"),
    ("a module", config(init_lora_weights="os.system"), "OPTION_NOT_SERVED", "'init_lora_weights' is 'os.system'"),
    ("a hostile regex", config(target_modules=HOSTILE), "BAD_CHECKPOINT", "target_modules"),
    ("a tensor of the backbone's", tensors(lambda t: t.update({NORM: torch.ones(32)})), "TENSORS_LEFT_OVER", NORM[17:]),
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(llama: Any) -> list[list[int]]:
    """What each of WHO gets when nothing is spoilt."""
    return [list(llama("Generate", **who, **ASKED).results[0].samples[0].ids) for who in WHO]


@pytest.fixture
def spoilt(llama: Any) -> Iterator[Path]:
    folder = llama.root / "spoilt"
    shutil.copytree(llama.root / "lora", folder)
    yield folder
    shutil.rmtree(folder)


def names(server: Any) -> list[str]:
    return [delta.name for delta in server("ListDeltas").deltas]


@pytest.mark.parametrize("case", SPOILT, ids=[case[0] for case in SPOILT])
def test_others_run_on(case: Any, llama: Any, alone: list[list[int]], spoilt: Path) -> None:
    _, spoil, reason, said = case
    spoil(spoilt)
    before, known = llama.app.engine.stats().pool_used_bytes, names(llama)
    streams = [llama.inference.StreamGenerate(pb.StreamGenerateRequest(**who, **ASKED), timeout=60) for who in WHO]
    first = [next(stream) for stream in streams]
    failure = llama.fails("LoadDelta", name="spoilt", source="spoilt")
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", reason), failure.message
    assert said in failure.message
    assert str(llama.root) not in failure.message
    for stream, begun, tokens in zip(streams, first, alone, strict=True):
        assert [i for chunk in (begun, *stream) for i in chunk.ids] == tokens
    later = llama("Generate", **WHO[0], **ASKED)
    assert list(later.results[0].samples[0].ids) == alone[0]
    assert names(llama) == known and "spoilt" not in known
    assert llama.fails("GetDelta", name="spoilt").code == "NOT_FOUND"
    assert llama.app.engine.stats().pool_used_bytes == before and llama.idle()


def test_what_peft_would_follow_is_not_followed(llama: Any, alone: list[list[int]], spoilt: Path) -> None:
    """Names of files, code and hosts that change nothing here are left alone, and the delta is served."""
    config(
        base_model_name_or_path="/etc/passwd",
        revision="http://127.0.0.1:9/x",
        auto_mapping={"base_model_class": "system", "parent_library": "os"},
        megatron_config={"x": 1},
        megatron_core="os",
    )(spoilt)
    delta = llama.load("followed", "spoilt")
    try:
        assert any("'/etc/passwd'" in warning for warning in delta.warnings)
        told = llama("Generate", deltas=["followed"], **ASKED)
        assert list(told.results[0].samples[0].ids) == alone[0] != alone[1]
    finally:
        llama("UnloadDelta", name="followed", wait=True)
