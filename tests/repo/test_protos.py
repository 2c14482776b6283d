"""The generated code is what the .proto files say."""

import subprocess
import sys
from pathlib import Path


def test_generated_code_is_fresh(root: Path) -> None:
    check = subprocess.run(
        [sys.executable, "protos/generate.py", "--check"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_generated_files_import_each_other_absolutely(root: Path) -> None:
    folder = root / "protos" / "deltaserve_protos" / "v1"
    generated = sorted(folder.glob("*_pb2*.py"))
    assert {file.name for file in generated} >= {f"{proto.stem}_pb2.py" for proto in folder.glob("*.proto")}
    for file in generated:
        imports = [
            line for line in file.read_text().splitlines() if line.startswith(("import ", "from ")) and "_pb2" in line
        ]
        assert all(line.startswith(("from deltaserve_protos.v1 ", "from google.")) for line in imports), imports
