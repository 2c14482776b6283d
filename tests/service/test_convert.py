"""`deltaserve convert` as a process, and a server that loads what it wrote; what a server refuses to lower itself."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaserve_protos.v1 import deltas_pb2 as dp
from deltaserve_protos.v1 import inference_pb2 as pb

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("DELTASERVE_")} | {"OMP_NUM_THREADS": "1"}
ASK: dict[str, Any] = {"inputs": [pb.Input(ids=[5, 6, 7])], "sampling": pb.Sampling(max_new_tokens=8, ignore_eos=True)}

pytestmark = pytest.mark.timeout(400)
"""Each conversion is a process that imports torch, which takes a busy machine half a minute."""


def convert(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deltaserve", "convert", *map(str, words)], cwd=cwd, env=ENVIRONMENT, timeout=180,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pissa(llama: Any) -> str:
    """The name of a checkpoint that needs the backbone's singular values."""
    config = llama.made.lora(init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    llama.made.delta("pissa", 11, config)
    return "pissa"


def tokens(server: Any, delta: str) -> tuple[list[int], list[float]]:
    asked = ASK | {"sampling": pb.Sampling(max_new_tokens=8, ignore_eos=True, logprobs=1)}
    sample = server("Generate", deltas=[delta], **asked).results[0].samples[0]
    return list(sample.ids), [each.chosen.logprob for each in sample.logprobs]


def test_a_converted_delta_answers_as_the_checkpoint_does(llama: Any, pissa: str) -> None:
    done = convert(pissa, "pissa-ahead", "--backbone", llama.made.backbone, "--dtype", "float32", cwd=llama.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(word in done.stdout for word in ("lora", "float32", "sites", "before", "after", "seconds"))
    assert sorted(file.name for file in (llama.root / "pissa-ahead").iterdir()) == ["delta.json", "delta.safetensors"]
    assert not [file for file in llama.root.iterdir() if file.name.startswith(".")]
    llama.load("pissa")
    ahead = llama.load("pissa-ahead")
    assert (ahead.format, list(ahead.kinds), list(ahead.warnings)) == ("deltaserve", ["lora"], [])
    assert ahead.device_bytes == llama("GetDelta", name="pissa").delta.device_bytes
    assert tokens(llama, "pissa-ahead") == tokens(llama, "pissa") != tokens(llama, "lora")
    # In one batch with each other, another delta and the bare backbone.
    asked = [pb.GenerateRequest(deltas=[name], **ASK) for name in ("pissa-ahead", "lora", "pissa")]
    asked.append(pb.GenerateRequest(backbone=True, **ASK))
    together = [llama.inference.Generate.future(each, timeout=60) for each in asked]
    first, other, last, bare = (list(each.result().results[0].samples[0].ids) for each in together)
    assert first == last == tokens(llama, "pissa")[0] and other == tokens(llama, "lora")[0]
    assert first not in (other, bare)
    # Loaded again it is the same one; with other content it is another.
    assert llama.load("pissa-ahead").version == ahead.version
    assert llama.fails("LoadDelta", name="pissa-ahead", source="pissa").reason == "DELTA_EXISTS"


def test_a_head_keeps_its_labels(bert: Any) -> None:
    words = ["mood", "mood-ahead", "--backbone", bert.made.backbone, "--dtype", "float32", "--json"]
    labels = [word for label in ("bad", "so-so", "good") for word in ("--label", label)]
    done = convert(*words, *labels, cwd=bert.root)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["card"]["labels"] == ["bad", "so-so", "good"] and told["card"]["head_width"] == 3
    assert told["after_bytes"] == (bert.root / "mood-ahead" / "delta.safetensors").stat().st_size
    ahead = bert.load("mood-ahead")
    assert (list(ahead.labels), ahead.task) == (["bad", "so-so", "good"], dp.TASK_SEQUENCE_CLASSIFICATION)
    asked = {"inputs": [pb.Input(ids=[1, 4, 6, 2])]}
    first, second = (bert("Classify", deltas=[name], **asked).results for name in ("mood-ahead", "mood"))
    assert first == second and first[0].ByteSize() > 0
    failure = bert.fails("LoadDelta", name="mood-two", source="mood-ahead", labels=["a", "b"])
    assert (failure.code, failure.field) == ("INVALID_ARGUMENT", "labels")
    renamed = bert.load("mood-renamed", "mood-ahead", labels=["x", "y", "z"])
    assert list(renamed.labels) == ["x", "y", "z"]


def test_what_takes_too_long_says_what_to_type(called: Callable[..., Any], llama: Any, pissa: str) -> None:
    server = called("llama", lowering_seconds=0)
    failure = server.fails("LoadDelta", name="slow", source=pissa)
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "LOWERING_TOO_LONG")
    assert "--lowering-seconds" in failure.message
    _, command, _ = failure.message.split("`")
    words = shlex.split(command)
    assert words[:4] == ["deltaserve", "convert", pissa, "pissa-converted"]
    done = convert(*words[2:], cwd=server.root)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = server.load("slow", "pissa-converted")
    assert loaded.state == dp.DELTA_STATE_RESIDENT
    assert server.load("lora").kinds == ["lora"], "what computes nothing is lowered by the server itself"
    llama.load("pissa")
    assert tokens(server, "slow") == tokens(llama, "pissa")
    # What was evicted is read again, under the same limit.
    key = server.app.catalog.current("slow").key
    assert server.app.catalog.fetch(key).provenance.content_hash == loaded.content_hash


def test_a_limit_that_was_kept_is_kept_at_the_next_read(called: Callable[..., Any], pissa: str) -> None:
    server = called("llama", lowering_seconds=20)
    server.load("pissa")
    key = server.app.catalog.current("pissa").key
    assert server.app.catalog.fetch(key).kinds == ("lora",)


def test_other_weights(called: Callable[..., Any], llama: Any, pissa: str) -> None:
    """Weights rounded to another dtype are others."""
    words = ("--backbone", llama.made.backbone, "--dtype", "bfloat16")
    assert convert(pissa, "pissa-rounded", *words, cwd=llama.root).returncode == 0
    failure = llama.fails("LoadDelta", name="rounded", source="pissa-rounded")
    assert (failure.code, failure.reason) == ("FAILED_PRECONDITION", "OTHER_WEIGHTS")
    assert "made for other weights" in failure.message and "--dtype" in failure.message


def test_mistakes_are_one_block(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    backbone, lora = llama.made.backbone, llama.root / "lora"
    mistakes: dict[tuple[Any, ...], tuple[int, str]] = {
        (lora, "there", "--backbone", backbone, "--force"): (1, "DESTINATION_EXISTS"),
        ("empty", "new", "--backbone", backbone): (1, "BAD_CHECKPOINT"),
        (lora, "new", "--backbone", tmp_path / "empty"): (1, "BACKBONE_NOT_FOUND"),
        (lora, "new"): (2, "--backbone"),
    }
    for words, (code, said) in mistakes.items():
        done = convert(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "there"]


def test_pickle_only_where_it_is_allowed(llama: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    (tmp_path / "old").mkdir()
    config = (llama.root / "lora" / "adapter_config.json").read_text()
    (tmp_path / "old" / "adapter_config.json").write_text(config)
    torch.save(load_file(llama.root / "lora" / "adapter_model.safetensors"), tmp_path / "old" / "adapter_model.bin")
    words = ("old", "new", "--backbone", llama.made.backbone, "--dtype", "float32")
    refused = convert(*words, cwd=tmp_path)
    assert refused.returncode == 1 and "PICKLE_NOT_ALLOWED" in refused.stderr
    assert convert(*words, "--allow-pickle-archives", cwd=tmp_path).returncode == 0
