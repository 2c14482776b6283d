"""The cells of the table of what is served where, and their signs."""

import contextlib
import dataclasses
import os
import re
import warnings
from pathlib import Path
from typing import Any

import transformers

from deltaserve.deltas.adapters import Coupling
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.primitives import Head, SoftPrompt

COMPARED, SERVED, DIFFERS, REFUSED, CANNOT, UNTRIED = "●", "○", "≠", "✗", "–", " "
LONGEST = 160


@dataclasses.dataclass(frozen=True)
class Cell:
    """`mark` is one of the six signs; `why` is PEFT's own error, or what an operator is told."""

    mark: str
    why: str = ""
    type: str = ""
    options: str = ""
    primitives: frozenset[str] = frozenset()


def primitives(delta: Delta) -> frozenset[str]:
    """Names of all that a delta is made of."""
    beside = {SoftPrompt: delta.prompt, Head: delta.head, Coupling: delta.coupling}
    found = {type(one).__name__ for primitives in delta.at.values() for one in primitives}
    return frozenset(found | {kind.__name__ for kind, held in beside.items() if held is not None})


def short(text: str) -> str:
    """Of a reason, what fits a line of the file."""
    text = re.sub(r"'\w+(\.\w+)+'", "a module", text).replace("|", "\\|").replace("<", "\\<")
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


@contextlib.contextmanager
def quiet() -> Any:
    """transformers and PEFT talk while models are made; nothing of it is news here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield
