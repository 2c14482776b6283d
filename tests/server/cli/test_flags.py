"""`serve` has a flag for each setting and no default of its own; all help is complete, and light."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from pydantic import ByteSize, TypeAdapter
from pydantic_core import PydanticUndefined

from deltaserve.cli import program
from deltaserve.cli.serve import given
from deltaserve.config import Settings, settings

ROOT: Any = typer.main.get_command(program.app)
SERVE: Any = ROOT.commands["serve"]
FLAGS = {parameter.name: parameter for parameter in SERVE.params if parameter.name != "help"}


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def parsed(*words: str) -> Settings:
    return settings(given(SERVE.make_context("serve", list(words)).params))


def choices(annotation: Any) -> tuple[Any, ...] | None:
    """Of a Literal, or of a Literal among the members of a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for each in get_args(annotation) if (found := choices(each))), None)


def test_flags_are_the_settings() -> None:
    assert set(FLAGS) == set(Settings.model_fields)
    for name, flag in FLAGS.items():
        if name != "backbone":
            assert f"--{name.replace('_', '-')}" in flag.opts


def test_defaults_are_written_in_the_settings_only() -> None:
    assert {name: flag.default for name, flag in FLAGS.items() if flag.default is not None} == {}


@pytest.mark.parametrize("name", sorted(set(FLAGS) - {"backbone"}))
def test_help_tells_the_default(name: str) -> None:
    field, shown = Settings.model_fields[name], FLAGS[name].show_default
    assert field.default is not PydanticUndefined
    if isinstance(field.default, ByteSize):
        assert TypeAdapter(ByteSize).validate_python(shown) == field.default
    elif isinstance(field.default, bool | tuple):
        assert field.default in (False, ())
        assert shown in (False, True, None)
    elif field.default is not None:
        assert shown == str(field.default)


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_choices_are_those_of_the_setting(name: str) -> None:
    wanted = choices(Settings.model_fields[name].annotation)
    assert wanted == choices(program.serve.serve.__annotations__[name].__args__[0] if wanted else None)


def test_flags_reach_the_settings() -> None:
    plain = parsed("some/backbone")
    assert plain == settings({"backbone": "some/backbone"})
    full = parsed(
        "b", "--host", "::1", "--grpc-port", "0", "--metrics-port", "1", "--insecure", "--served-model-name", "tiny",
        "--revision", "r", "--tokenizer", "t", "--dtype", "float32", "--device", "cuda:1", "--threads", "3",
        "--lora-modules", "a=x", "--delta", "b/c=y=z", "--delta-root", "/deltas", "--delta-dtype", "float16",
        "--allow-pickle-archives", "--max-model-len", "9", "--max-running", "8", "--max-queued", "7",
        "--max-batch-tokens", "6", "--batch-wait-ms", "0.5", "--max-message-bytes", "1MiB", "--request-timeout", "5",
        "--drain-seconds", "0", "--pool-bytes", "8GiB", "--kv-bytes", "1GiB", "--gpu-memory-utilization", "0.5",
        "--lowering-seconds", "1.5", "--log-format", "json", "--log-level", "debug",
    )  # fmt: skip
    assert full.deltas == (("a", "x"), ("b/c", "y=z"))
    assert (full.host, full.grpc_port, full.pool_bytes, full.drain_seconds) == ("::1", 0, 8 << 30, 0)
    assert full.delta_root == Path("/deltas")
    same = {name for name in FLAGS if getattr(full, name) == getattr(plain, name)}
    assert same == set()


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTASERVE_GRPC_PORT", "7000")
    monkeypatch.setenv("DELTASERVE_MAX_RUNNING", "7")
    monkeypatch.setenv("DELTASERVE_BACKBONE", "from/environment")
    chosen = parsed("--grpc-port", "7001")
    assert (chosen.backbone, chosen.grpc_port, chosen.max_running) == ("from/environment", 7001, 7)


@pytest.mark.parametrize(("path", "command"), [pytest.param(*pair, id=" ".join(pair[0])) for pair in commands()])
def test_everything_has_help(path: tuple[str, ...], command: Any) -> None:
    assert command.help
    assert [parameter.name for parameter in command.params if not parameter.help] == []
    assert "json" in {parameter.name for parameter in command.params} or path == ("serve",)


def test_brackets_survive(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "[tenant/]name" in command("deltas", "load", "--help").out
    assert "cuda[:n]" in command("serve", "b", "--help").out


def test_version(command: Any) -> None:
    assert command("--version").out.startswith("deltaserve 0.")


LIGHT = """
import json, sys
from deltaserve.cli.program import run
try:
    run(sys.argv[1:])
except SystemExit as ended:
    heavy = {"torch", "transformers", "numpy", "triton", "safetensors"} & set(sys.modules)
    print(json.dumps([ended.code, sorted(heavy)]))
"""


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["doctor", "--grpc", "127.0.0.1:1"], ["info"]])
def test_torch_is_not_imported(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        env={"DELTASERVE_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert code == (0 if "--help" in words else 1 if "doctor" in words else 3)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltaserve"], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        env={"_DELTASERVE_COMPLETE": f"source_{shell}"},
    )  # fmt: skip
    assert "deltaserve" in done.stdout, done.stderr
