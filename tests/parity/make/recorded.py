"""What both makers share: texts, questions to a model, and the three files that a family's cases become.

`<family>.zip` holds the checkpoints, a folder a case. `<family>.safetensors` holds what the library answered: for each
case and text `<case>/<n>/ids`, `.../rows` float32, and where it generated `.../tokens`. `<family>.json` says how each
case was asked, and of the cases without an answer why the library has none.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import SPECIAL, VOCABULARY
from safetensors.torch import save_file

SEED = 20_270_301
NEW_TOKENS = 16
MOVED = 1e-2
RELOADED = 1e-5
SHORTEST, LONGEST = 6, 12
DATE = (2027, 1, 1, 0, 0, 0)
"""Of every file in an archive, so that the same bytes come out."""

HERE = Path(__file__).parent
ORACLES = HERE.parent / "oracles"

Answer = tuple[list[int], torch.Tensor]
"""Greedy tokens, none where nothing was generated, and rows [n, width]."""
Logits = Callable[[list[int], list[int]], torch.Tensor]
"""`logits(ids, tokens)` of a whole forward over the input and what was generated: [rows, vocabulary]."""


def backbone(library: str, family: str) -> Path:
    """The folder of a family's backbone, or of the one that a library needs otherwise."""
    own = ORACLES / "backbones" / f"{library}-{family}"
    return own if own.is_dir() else ORACLES / "backbones" / family


def seed(name: str) -> int:
    return SEED + 31 * sum(place * ord(letter) for place, letter in enumerate(name, 1)) % 1_000_003


def texts(name: str, count: int) -> list[list[int]]:
    """Inputs of odd lengths, others for each case."""
    random = torch.Generator().manual_seed(seed(name))
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=random).tolist()
    return [torch.randint(SPECIAL, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def greedy(logits: Logits, ids: list[int]) -> Answer:
    """Tokens by full forwards without a cache, and the logits [NEW_TOKENS, vocabulary] they were chosen by."""
    tokens: list[int] = []
    rows = []
    for _ in range(NEW_TOKENS):
        rows.append(logits(ids, tokens)[-1].float())
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def ratio(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Worst row's rms of the difference over the rms of `theirs`."""
    return float(((ours - theirs).square().mean(-1) / theirs.square().mean(-1)).sqrt().max())


def said(error: Exception) -> str:
    """What an exception says, in one short line that is the same tomorrow."""
    first = (str(error).splitlines() or [""])[0]
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {first}")[:160]


@dataclass
class Recorder:
    """One family's cases of one library, as they are made."""

    library: str
    family: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    cannot: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def answered(self, name: str, asked: Sequence[list[int]], answers: Sequence[Answer]) -> None:
        for n, (ids, (tokens, rows)) in enumerate(zip(asked, answers, strict=True)):
            assert torch.isfinite(rows).all(), f"{self.family} {name}: not finite"
            self.tensors[f"{name}/{n}/ids"] = torch.tensor(ids, dtype=torch.int32)
            self.tensors[f"{name}/{n}/rows"] = rows.detach().float().contiguous()
            if tokens:
                self.tensors[f"{name}/{n}/tokens"] = torch.tensor(tokens, dtype=torch.int32)

    def keep(self, name: str, folder: Path, facts: Mapping[str, Any]) -> None:
        self._pack(name, folder)
        self.cases[name] = dict(facts)

    def refuse(self, name: str, why: str, folder: Path | None = None) -> None:
        """The library has no answer; a checkpoint that it did write is kept, for a reader to refuse."""
        if folder is not None:
            self._pack(name, folder)
        self.cannot[name] = {"why": why, "saved": folder is not None}

    def _pack(self, name: str, folder: Path) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.files[f"{name}/{file.relative_to(folder).as_posix()}"] = file.read_bytes()

    def write(self) -> None:
        place = ORACLES / self.library
        place.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name, DATE)
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
        (place / f"{self.family}.zip").write_bytes(packed.getvalue())
        answers = place / f"{self.family}.safetensors"
        save_file(self.tensors, answers)
        answers.chmod(0o644)  # it is written for its owner alone
        table = {"cases": self.cases, "cannot": self.cannot}
        (place / f"{self.family}.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def versions(library: str, *packages: str) -> None:
    """Writes down what made a library's oracles."""
    import sys
    from importlib.metadata import version

    found = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in packages}}
    (ORACLES / library / "versions.json").write_text(json.dumps(found, indent=1) + "\n")
