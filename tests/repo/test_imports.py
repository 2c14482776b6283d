"""Who imports whom: rooms point downwards, and what runs on a client's machine stays light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OF_THE_BASE_INSTALL = {"google", "grpc", "typing_extensions"}
NOT_OF_IT = ["grpc_tools", "grpc_health", "grpc_reflection"]  # grpc imports these itself where they are installed
HEAVY = {"torch", "transformers", "triton", "numpy", "safetensors", "tokenizers"}

IMPORT_CLIENT = """
import importlib, json, pkgutil, sys, sysconfig
sys.modules.update(dict.fromkeys(sys.argv[1:]))
before = set(sys.modules)
import deltaserve_client
for module in pkgutil.walk_packages(deltaserve_client.__path__, "deltaserve_client."):
    importlib.import_module(module.name)
places = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
new = [name for name in sys.modules if name not in before]
theirs = [name for name in new if (getattr(sys.modules[name], "__file__", None) or "").startswith(places)]
print(json.dumps(sorted({name.partition(".")[0] for name in theirs})))
"""

RUN_COMMAND = """
import json, runpy, sys
sys.argv = ["deltaserve", *sys.argv[1:]]
try:
    runpy.run_module("deltaserve", run_name="__main__")
    code = 0
except SystemExit as exit:
    code = exit.code or 0
print()
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def run(code: str, *arguments: str, cwd: Path) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_contracts(root: Path) -> None:
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_client_needs_the_base_install_only(tmp_path: Path) -> None:
    imported = set(json.loads(run(IMPORT_CLIENT, *NOT_OF_IT, cwd=tmp_path)))
    assert imported - OF_THE_BASE_INSTALL - {"deltaserve_client", "deltaserve_protos"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["demo", "--help"], ["generate", "--help"]])
def test_help_imports_no_torch(arguments: list[str], tmp_path: Path) -> None:
    answer = json.loads(run(RUN_COMMAND, *arguments, cwd=tmp_path))
    assert answer["code"] == 0
    assert HEAVY & set(answer["modules"]) == set()
