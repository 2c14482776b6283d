"""What another library wrote and answered, as make/ recorded it: its checkpoints, and references to compare with."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make.recorded import ORACLES, backbone
from safetensors.torch import load_file


@dataclass(frozen=True, eq=False)
class Recorded:
    """One text and what the library said to it: `tokens` [n] where it generated, `rows` [n, width].

    Rows are logits of generated tokens, hidden states of the last layer (of a prompt's rows too), or a head's scores.
    """

    ids: list[int]
    tokens: list[int]
    rows: torch.Tensor


class Oracle:
    """One family's cases of a library. `cases` and `cannot` by name: how each was asked, and why it could not be."""

    def __init__(self, library: str, family: str) -> None:
        self.library, self.family = library, family
        self._place = ORACLES / library
        table: dict[str, dict[str, dict[str, Any]]] = json.loads((self._place / f"{family}.json").read_text())
        self.cases, self.cannot = table["cases"], table["cannot"]
        self.backbone = backbone(library, family)
        self._tensors = load_file(self._place / f"{family}.safetensors")

    def answers(self, name: str) -> list[Recorded]:
        """Of a case, or of `bare`, the backbone alone."""
        found = []
        while f"{name}/{len(found)}/ids" in self._tensors:
            at = f"{name}/{len(found)}"
            tokens = self._tensors.get(f"{at}/tokens", torch.empty(0)).tolist()
            found.append(Recorded(self._tensors[f"{at}/ids"].tolist(), tokens, self._tensors[f"{at}/rows"]))
        return found

    def unpack(self, folder: Path) -> None:
        """Writes each case's checkpoint to `folder / name`, also those that the library itself could not use."""
        with zipfile.ZipFile(self._place / f"{self.family}.zip") as archive:
            archive.extractall(folder)
