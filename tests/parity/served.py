"""What is served where: asks PEFT and the formats room about every type and option on every family.

    python tests/parity/served.py           writes server/deltaserve/formats/README.md
    python tests/parity/served.py --check   writes nothing; fails if that file is stale

Each cell is tried: PEFT makes the delta over a tiny model, runs one forward and saves it, and its checkpoint is read.
"""

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import served_recorded
import torch
import transformers
from driven import Driven, forced
from families import FAMILIES, VOCABULARY, Family
from methods import DECODERS, GENERATING, HEADED, HEADS, LINEAR_ONLY, METHODS, Case, Make, cases
from reference import SEED, backbone, drawn, plain
from signs import CANNOT, COMPARED, DIFFERS, REFUSED, SERVED, UNTRIED, Cell, primitives, quiet, short

from deltaserve.deltas.sites import Pooling
from deltaserve.engine.request import Job, Request
from deltaserve.errors import DeltaserveError
from deltaserve.formats.peft import refused
from deltaserve_kernels.testing import error_ratio

README = Path(__file__).resolve().parents[2] / "server" / "deltaserve" / "formats" / "README.md"
TEXT, CONTINUATION = [9, 30, 7, 61, 22], [5, 44, 12]
EXACT = 1e-5


def _lora(**told: Any) -> Make:
    def make(family: Family) -> Any:
        chosen = {"target_modules": list(family.linears[:2]), "r": 4} | told
        return peft.LoraConfig(**{key: value(family) if callable(value) else value for key, value in chosen.items()})

    return make


def _tuner(word: str, **told: Any) -> Make:
    return lambda family: getattr(peft, f"{word}Config")(target_modules=list(family.linears[:2]), **told)


def _poly(family: Family) -> Any:
    return peft.PolyConfig(target_modules=list(family.linears[:2]), r=4, n_tasks=2, n_skills=2)


BESIDE: Mapping[str, Make] = {
    "lora-pissa-niter": _lora(init_lora_weights="pissa_niter_4"),
    "lora-eva": _lora(init_lora_weights="eva"),
    "layer-replication": _lora(layer_replication=[[0, 2], [1, 2]]),
    "supertuning": _tuner("Supertuning", sparsity=0.9),
    "supertuning-smallest": _tuner("Supertuning", sparsity=0.9, select_top=False, r=3),
    "lily": _tuner("Lily", r=4),
    "poly": _poly,
    "multitask-prompt": lambda f: peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2),
    "adaption-prompt": lambda f: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1),
    "shadow": lambda f: peft.ShadowConfig(),
}
"""What PEFT has beside the methods whose numbers tests/parity compares."""
_KNOWN: Mapping[str, Make] = {**METHODS, **LINEAR_ONLY, **GENERATING, **DECODERS}
MAKES: Mapping[str, Make] = _KNOWN | {name: make for name, make in BESIDE.items() if name not in _KNOWN}
ROWS: tuple[tuple[str, str | None], ...] = (
    *((name, None) for name in MAKES),
    *((name, task) for task in HEADS for name in HEADED),
)
"""A method, and the task of the head beside it."""


def column(name: str, folder: Path) -> dict[tuple[str, str | None], Cell]:
    """Every row of one family."""
    family = FAMILIES[name]
    backbone(family, folder / "backbone")
    driven = Driven(folder)
    compared = set(cases(name))
    found = {}
    for method, task in ROWS:
        case = Case(name, method, task or family.task)
        found[method, task] = _cell(case, family, driven, case in compared)
    driven.stop()
    return found


def _cell(case: Case, family: Family, driven: Driven, compared: bool) -> Cell:
    try:
        config = MAKES[case.method](family)
    except KeyError:  # the tables have no names of this family's modules for it
        return Cell(UNTRIED)
    except Exception as error:
        return Cell(CANNOT, _first(error))
    config.task_type = case.task
    told = {"type": str(config.peft_type.value), "options": _options(config)}
    try:
        rows = _peft(case, family, config, driven.folder)
    except Exception as error:
        return Cell(CANNOT, _first(error), **told)
    try:
        driven.lower(case.name, case.wanted)
    except DeltaserveError as error:
        return Cell(REFUSED, error.message, **told)
    told["primitives"] = primitives(driven.deltas[case.name])
    if compared:
        return Cell(COMPARED, **told)
    ratio = error_ratio(driven.answers([_request(case, driven)])[0][1], rows)
    return Cell(SERVED, **told) if ratio <= EXACT else Cell(DIFFERS, f"error ratio {ratio:.0e}", **told)


def _text(case: Case) -> list[int]:
    """T5's classifier reads the row of the end token."""
    return [*TEXT, 1] if case.task == "SEQ_CLS" and FAMILIES[case.family].encoder_decoder else TEXT


def _request(case: Case, driven: Driven) -> Request:
    known = {"id": case.name, "ids": tuple(_text(case)), "delta": driven.ref(case.name)}
    if case.task in HEADS:
        return Request(job=Job.CLASSIFY, **known)
    if case.task == "FEATURE_EXTRACTION":
        return Request(job=Job.EMBED, pooling=Pooling.MEAN, **known)
    return Request(job=Job.SCORE, continuation=tuple(CONTINUATION), score_logprobs=VOCABULARY, **known)


def _peft(case: Case, family: Family, config: Any, folder: Path) -> torch.Tensor:
    """Makes PEFT's model of a case, runs it once, and saves it as `folder / case.name`; returns what it said."""
    auto = getattr(transformers, HEADS.get(case.task, family.auto))
    if type(family.config()) not in auto._model_mapping:
        raise ValueError(f"transformers has no {auto.__name__} of this family")
    model = peft.get_peft_model(plain(case, folder / "backbone"), config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("PEFT finds nothing here that it could train")
    drawn(model, SEED + sum(map(ord, case.name)), trainable=True)
    model.eval()
    rows = forced(case, model, _text(case), [] if case.task in (*HEADS, "FEATURE_EXTRACTION") else CONTINUATION)
    model.save_pretrained(folder / case.name)
    return rows


def _options(config: Any) -> str:
    """Which keys are not PEFT's defaults, those that every config sets left out."""
    usual = {"task_type", "peft_type", "target_modules", "base_model_name_or_path", "r", "alpha", "lora_alpha"}
    usual |= {"inference_mode", "num_virtual_tokens", "peft_version", "auto_mapping"}
    known = {field.name: field for field in dataclasses.fields(config) if field.name not in usual}
    plain = {key: field.default for key, field in known.items()}
    plain |= {key: field.default_factory() for key, field in known.items() if callable(field.default_factory)}
    return ", ".join(f"`{key}`" for key in known if getattr(config, key) not in (plain[key], None))


def _first(error: Exception) -> str:
    """The first sentence, without what differs between families that fail alike."""
    line = re.sub(r"\s+", " ", str(error).strip().partition("\n")[0])
    # A set of names is printed in another order in each process.
    line = re.sub(r"\{('[^{}:]*')\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", line)
    line = re.split(r"\. (?=[A-Z])|: '\w+'\.$", line)[0]
    line = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", line)
    return re.sub(r"Conv1D\([^)]*\)", "Conv1D", f"{type(error).__name__}: {line}")


def title(row: tuple[str, str | None]) -> str:
    """What a row is called in the file."""
    return row[0] if row[1] is None else f"{row[1]}, {row[0]}"


Table = Mapping[str, Mapping[tuple[str, str | None], Cell]]


def render(table: Table) -> str:
    """The whole file, from a column for each family."""
    every = [cell for cells in table.values() for cell in cells.values()]
    count = {mark: sum(cell.mark == mark for cell in every) for mark in (COMPARED, SERVED, DIFFERS, REFUSED, CANNOT)}
    kinds = sorted({cell.type for cell in every if cell.mark in (COMPARED, SERVED)})
    whole = f"PEFT {peft.__version__} and transformers {transformers.__version__}"
    lines = [
        "# Which deltas are served on which family",
        "",
        "Generated by `python tests/parity/served.py`; do not edit. Each of PEFT's cells was tried on a tiny model "
        "with",
        f"{whole}: PEFT made the delta, ran it and saved it; its checkpoint was lowered and run.",
        "",
        f"| sign | meaning | cells ({sum(count.values())}) |",
        "|---|---|---|",
        f"| {COMPARED} | served; `tests/parity` holds it to PEFT alone and in a mixed batch | {count[COMPARED]} |",
        f"| {SERVED} | served; one forward here was that of PEFT, error ratio ≤ {EXACT:.0e} | {count[SERVED]} |",
        f"| {DIFFERS} | served, and that forward differed more; see below | {count[DIFFERS]} |",
        f"| {REFUSED} | refused, with the reason below | {count[REFUSED]} |",
        f"| {CANNOT} | PEFT itself cannot | {count[CANNOT]} |",
        "",
        f"Served are {len(kinds)} of PEFT's {len(peft.PeftType)} types: {', '.join(kinds)}.",
        "",
        "## Methods and options",
        "",
        *_grid(table, [row for row in ROWS if row[1] is None]),
        "",
        "## Heads",
        "",
        *_grid(table, [row for row in ROWS if row[1] is not None]),
        "",
        *_section(table, f"## Differs ({DIFFERS})", DIFFERS),
        f"## Refused ({REFUSED})",
        "",
        *_reasons(table, REFUSED),
        *_unsaved(every),
        "",
        f"## PEFT itself cannot ({CANNOT})",
        "",
        *_reasons(table, CANNOT),
    ]
    return "\n".join(lines) + "\n"


def _grid(table: Table, rows: list[tuple[str, str | None]]) -> list[str]:
    lines = [f"| type | tried as | options set | primitives | {' | '.join(table)} |", "|---" * (4 + len(table)) + "|"]
    for row in rows:
        cells = [cells[row] for cells in table.values()]
        known = next((cell for cell in cells if cell.type), cells[0])
        made = sorted(set().union(*(cell.primitives for cell in cells)))
        marks = " | ".join(cell.mark for cell in cells)
        lines.append(f"| {known.type or '?'} | {title(row)} | {known.options} | {', '.join(made)} | {marks} |")
    return lines


def _section(table: Table, title: str, mark: str) -> list[str]:
    lines = _reasons(table, mark)
    return [title, "", *lines, ""] if lines else []


def _reasons(table: Table, mark: str) -> list[str]:
    """A line for each reason, with the rows and families that it is the reason at."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in ROWS:
        by_reason: dict[str, list[str]] = {}
        for family, cells in table.items():
            if cells[row].mark == mark:
                by_reason.setdefault(short(cells[row].why), []).append(family)
        for why, families in by_reason.items():
            on = "all families" if len(families) == len(table) else ", ".join(families)
            where.setdefault((why, on), []).append(title(row))
    return [f"- {'; '.join(rows)} (on {on}): {why}" for (why, on), rows in where.items()]


def _unsaved(every: list[Cell]) -> list[str]:
    """Types that are not tried: PEFT makes them out of other checkpoints, or needs a package that is not here."""
    tried = {cell.type for cell in every}
    return [f"- {kind} (not tried): {refused.REFUSED.get(kind, '')}" for kind in _kinds() if kind not in tried]


def _kinds() -> list[str]:
    return [str(kind.value) for kind in peft.PeftType]


def marks(text: str, family: str) -> dict[str, str]:
    """A family's signs in a rendered file, by the first cells of their rows."""
    found, place = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| type |"):
            place = cells.index(family)
        elif place is not None and line.startswith("| "):
            found[cells[1]] = cells[place]
        elif not line.startswith("|"):
            place = None
    return found


def whole() -> str:
    """The file as it should be."""
    table = {}
    with tempfile.TemporaryDirectory() as place:
        for name in FAMILIES:
            table[name] = column(name, Path(place) / name)
    return render(table) + "\n" + served_recorded.part()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    say = partial(print, file=sys.stderr)
    with quiet():
        wanted = whole()
    if check and (not README.is_file() or README.read_text(encoding="utf-8") != wanted):
        sys.exit("stale: server/deltaserve/formats/README.md; run python tests/parity/served.py")
    if not check:
        README.write_text(wanted, encoding="utf-8")
    say("server/deltaserve/formats/README.md is what PEFT and the formats room say")


if __name__ == "__main__":
    main()
