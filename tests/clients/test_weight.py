"""The client is light: no torch, and soon there."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys, time
start = time.process_time()
import deltaserve_client
print(json.dumps([time.process_time() - start, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
HEAVY = {"torch", "transformers", "numpy", "pydantic", "rich", "typer", "deltaserve"}


def test_import(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        took, modules = json.loads(done.stdout)
        seconds.append(took)
        assert HEAVY & set(modules) == set()
    assert min(seconds) < 0.5  # of processor time: whoever else is busy does not count
