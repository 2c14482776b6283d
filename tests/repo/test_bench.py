"""The benches run, say what they found in one schema, and the README quotes what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VARIANTS = 6
MIXED = "4 kinds mixed"
MEASURED = {"median", "low", "high", "samples"}


def bench(root: Path, *arguments: str, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=seconds
    )


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


TINY_BERT = 85760
"""Bytes of its weights."""


@pytest.mark.timeout(300)
def test_micro(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "micro.jsonl"
    done = bench(root, "micro", "--quick", "--tiny", "--threads", "1", "--out", str(file), seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PEFT mixed batch" in done.stdout
    found = [row for row in rows(file) if row["name"].startswith("micro.")]
    cases = {json.dumps({**row["parameters"], "variant": ""}) for row in found}
    assert len(found) == VARIANTS * len(cases)
    assert len(cases) >= 3
    for row in found:
        assert row["outcome"] == "measured"
        assert set(row["seconds"]) == set(row["ratio"]) == MEASURED
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["origin"]["threads"] == 1
        assert row["origin"]["versions"]["torch"]
    checked = {row["parameters"]["variant"] for row in found if row["error_ratio"] is not None}
    assert len(checked) == 4, "all of ours are compared with transformers' or PEFT's result"

    of_kinds = [row for row in rows(file) if row["name"].startswith("kinds.")]
    assert {row["parameters"]["kind"] for row in of_kinds} >= {"lora", "boft", "prompt-tuning", "head", MIXED}
    assert len(of_kinds) >= 12
    for row in of_kinds:
        assert row["outcome"] == "measured" and row["error_ratio"] <= row["limit"]
        assert set(row["seconds"]) == set(row["ratio"]) == MEASURED
        assert row["nbytes"] > 0
    told = {row["parameters"]["kind"]: row["parameters"]["rows"] for row in of_kinds if row["name"] == "kinds.encode"}
    assert told["prompt-tuning"] == told["lora"] + 32 * 20
    report = bench(root, "report", str(file))
    assert report.returncode == 0, report.stderr
    assert f"| {MIXED} |" in report.stdout and "| boft | all linears |" in report.stdout


def test_copies(root: Path, tmp_path: Path) -> None:
    """Room for five copies of the tiny BERT: for six tasks there are none, and the row says so."""
    file = tmp_path / "copies.jsonl"
    done = bench(root, "copies", "--tiny", "--threads", "1", "--room", str(TINY_BERT * 5), "--out", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {tuple(row["parameters"][key] for key in ("work", "kind", "variant")): row for row in rows(file)}
    served = {"bare backbone", "deltaserve", "one copy, weights swapped"}
    of_copies, of_peft = {"copies in turn", "copies side by side"}, {"PEFT, mixed batch", "PEFT, set_adapter"}
    loras = {variant for work, kind, variant in found if (work, kind) == ("encode", "LoRA")}
    assert loras == served | of_copies | of_peft
    assert {kind for _, kind, _ in found} == {"LoRA", "mixed"}
    for (_, _, variant), row in found.items():
        if row["outcome"] == "left out":
            assert variant in of_copies and row["seconds"] is None and "copies fit" in row["note"]
            continue
        assert row["outcome"] == "measured" and set(row["seconds"]) == set(row["ratio"]) == MEASURED
        if variant not in {"bare backbone", "one copy, weights swapped"}:
            assert row["error_ratio"] <= row["limit"] == 1e-5
    assert found["encode", "LoRA", "copies in turn"]["nbytes"] == 5 * TINY_BERT
    assert found["encode", "mixed", "copies in turn"]["note"].startswith("5 of 6 copies fit")
    assert found["encode", "mixed", "deltaserve"]["outcome"] == "measured"
    report = bench(root, "report", str(file))
    assert report.returncode == 0, report.stderr
    lines = [line for line in report.stdout.splitlines() if line.startswith("| tiny-bert ")]
    assert len(lines) == 2
    assert "5 of 6 fit" in lines[1] and "5 of 6 fit" not in lines[0]


def test_counted_costs_and_limits(root: Path) -> None:
    """32 LoRA of rank 16 at all linears are 2.68 GB beside 15.0 GB of weights and 2.1 GB of keys and values."""
    done = bench(root, "micro", "--model", seconds=110)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    limits = {(row[0], row[1]): row[2:] for row in cells if row[0].startswith("llama")}
    assert limits["llama-8b", "LoRA r16"] == ["83.89", "0.994", "0.959", "0.865", "0.687"]
    assert len(limits) == 18
    assert all(row[1] > row[-1] for row in limits.values())
    primitives = {(row[0], row[1]): row[2:] for row in cells if len(row) == 8}
    linear = primitives["decode 32, 32 deltas", "linear (the backbone's)"]
    assert linear[:2] == ["34.079", "1.0737"] and linear[-1] == "memory"


def test_gpu_says_that_there_is_none(root: Path, tmp_path: Path) -> None:
    done = bench(root, "gpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith("no GPU")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(300)
def test_tiles_are_tuned(root: Path, tmp_path: Path) -> None:
    """In an interpreter, whose times mean nothing: each kernel runs with neighbours of its tiles."""
    file = tmp_path / "tuning.json"
    done = bench(root, "tune", "--tiny", "--out", str(file), seconds=280)
    assert done.returncode == 0, done.stdout + done.stderr
    packaged = json.loads((root / "kernels/deltaserve_kernels/gpu/tuning.json").read_text())
    found = json.loads(file.read_text())
    splits: dict[str, list[int]] = {}
    for name, chips in packaged.items():
        own = found[name].pop("interpreted")
        assert found[name] == chips
        assert [one["most"] for one in own] == [one["most"] for one in chips["default"]]
        splits[name] = [one["tiles"]["split"] for one in own]
        assert [one["tiles"]["m"] for one in own] == [one["tiles"]["m"] for one in chips["default"]]
    assert splits["activated"] == splits["low rank"]
    assert done.stdout.count(" tried, ") == 8
    without = bench(root, "tune")
    assert without.returncode == 2 and without.stdout.startswith("no GPU")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_gpu_entry_on_the_cpu(root: Path, tmp_path: Path) -> None:
    """All of it, in sizes for an interpreter."""
    done = bench(root, "gpu", "--tiny", "--threads", "1", "--minutes", "60", "--out", str(tmp_path), seconds=580)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "gpu.jsonl")
    outcomes = {
        name: {row["outcome"] for row in found if row["name"] == name} for name in {row["name"] for row in found}
    }
    assert outcomes.pop("gpu.graphs") == {"not yet"}
    assert outcomes.pop("gpu.op") == outcomes.pop("gpu.engine") == {"right"}
    assert set(outcomes) == {"gpu.primitive", "retention.decode", "retention.prefill", "micro.encode", "micro.decode"}
    assert all(outcome == {"measured"} for outcome in outcomes.values()), outcomes
    kept = [row for row in found if row["name"] == "retention.decode" and row["limit"] is not None]
    assert {row["parameters"]["kind"] for row in kept} >= {
        "LoRA r8",
        "LoRA r64",
        "adapter 64",
        "prefix 32",
        "BitFit",
        "IA3",
    }
    assert all(0 < row["limit"] < 1 and row["nbytes"] > 0 for row in kept)
    assert done.stdout.rindex("What is kept") > done.stdout.rindex("One forward of 8 requests")


def test_readme_quotes_the_results(root: Path) -> None:
    done = bench(root, "report")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (root / "README.md").read_text()
