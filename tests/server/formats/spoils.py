"""Ways to spoil a checkpoint, its config, its tensors or the bytes of its files; drawn by hypothesis."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from deltaserve.formats import folder as layouts
from deltaserve.formats.adapterhub.configs import ARCHITECTURES
from deltaserve.formats.folder import NATIVE, OPENDELTA, PEFT, Layout
from deltaserve.formats.native.record import PRIMITIVES
from deltaserve.formats.opendelta import types as opendelta_types
from deltaserve.formats.peft.types import TYPES


@dataclass
class Files:
    """A checkpoint to be spoilt: first its parts, then the bytes that they make."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layout: Layout = PEFT
    pickled: bool = False
    late: list[Callable[[dict[str, bytearray]], None]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        made = {self.layout.config: bytearray(json.dumps(self.config).encode())}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if self.pickled:
            assert self.layout.pickled is not None
            torch.save(tensors, folder / self.layout.pickled)
            made[self.layout.pickled] = bytearray((folder / self.layout.pickled).read_bytes())
        elif self.layout.tensors:
            made[self.layout.tensors] = bytearray(save(tensors))
        for change in self.late:
            change(made)
        for name, content in made.items():
            (folder / name).write_bytes(content)


HOSTILE = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**400, 0.5, 1e-320, 1e38, -1e308, float("nan"), float("inf")),
    *("", "x", "all-linear", "default", ".*", "(a+)+$", r"(.*\.)*(.*\.)*(.*\.)*(.*\.)*(.*\.)*z", "(", "(?i)"),
    *(r"\1", "x" * 3000, "../../etc/passwd", "/etc/passwd", "http://127.0.0.1:9/x", "os.system", "\0", "\ud800", "é"),
    *([], {}, [[]], [None], [""], ["q"], [-1], [1 << 70], [0] * 20_000, {"": 1}, {"q": 0}, {"q": {"q": 1}}, {"(": 2}),
)  # fmt: skip
VALUES = st.sampled_from(HOSTILE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(sorted(TYPES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32),
    *(torch.int64, torch.bool),
)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, 1.0, -1.0, 1e20)
OPTIONS = sorted(
    set().union(
        *(
            row.options.used | row.options.inert | set(row.options.refused)
            for table in (TYPES, opendelta_types.TYPES)
            for row in table.values()
        )
    )
)


def picked(draw: st.DrawFn, files: Files) -> str:
    return draw(st.sampled_from(sorted(files.tensors)))


def replaced_value(draw: st.DrawFn, files: Files) -> None:
    key = draw(st.sampled_from(sorted(files.config)) | st.sampled_from(OPTIONS) | st.text(max_size=5))
    files.config[key] = draw(VALUES)


def replaced_inside(draw: st.DrawFn, files: Files) -> None:
    """One entry of a list or of an object in the config."""
    nested = sorted(key for key, value in files.config.items() if isinstance(value, list | dict) and value)
    if nested:
        key = draw(st.sampled_from(nested))
        inner = files.config[key] = json.loads(json.dumps(files.config[key]))
        place = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner[place] = draw(VALUES)


def removed_key(draw: st.DrawFn, files: Files) -> None:
    del files.config[draw(st.sampled_from(sorted(files.config)))]


def other_type(draw: st.DrawFn, files: Files) -> None:
    key, table = ("delta_type", opendelta_types.TYPES) if files.layout == OPENDELTA else ("peft_type", TYPES)
    files.config[key] = draw(st.sampled_from(sorted(table)))


def reshaped(draw: st.DrawFn, files: Files) -> None:
    name = picked(draw, files)
    shape = draw(st.lists(st.integers(0, 40), max_size=4))
    tensor = files.tensors[name]
    ways = (
        tensor.flatten(), tensor.T if tensor.ndim == 2 else tensor, tensor.unsqueeze(0), tensor[:0],
        tensor[:1] if tensor.ndim else tensor, torch.ones(shape, dtype=tensor.dtype),
    ) if tensor.ndim else (tensor.unsqueeze(0), torch.ones(shape))  # fmt: skip
    files.tensors[name] = draw(st.sampled_from(ways)).clone()


def retyped(draw: st.DrawFn, files: Files) -> None:
    name = picked(draw, files)
    files.tensors[name] = files.tensors[name].to(draw(st.sampled_from(DTYPES)))


def renumbered(draw: st.DrawFn, files: Files) -> None:
    """One number, or all of a tensor."""
    name = picked(draw, files)
    tensor = files.tensors[name] = files.tensors[name].clone()
    number = draw(st.sampled_from(NUMBERS))
    if not tensor.is_floating_point():
        number = draw(st.sampled_from((-1, 0, 1, 100, 127)))
    at = slice(None) if draw(st.booleans()) else slice(0, 1)
    tensor.flatten()[at] = number if tensor.dtype != torch.uint8 else abs(int(number))


def names(files: Files) -> st.SearchStrategy[str]:
    known = sorted(files.tensors)
    words = (
        "base_model.model.lm_head.weight",
        "base_model.model.score.weight",
        "prompt_embeddings",
        "base_model.",
        "",
        "漢" * 5000,
    )
    layers = [name.replace(".0.", ".9.") for name in known]
    return st.sampled_from([*known, *words, *layers, *(n + ".x" for n in known[:3])]) | st.text(max_size=9)


def renamed(draw: st.DrawFn, files: Files) -> None:
    name = picked(draw, files)
    files.tensors[draw(names(files))] = files.tensors.pop(name)


def duplicated(draw: st.DrawFn, files: Files) -> None:
    name = picked(draw, files)
    files.tensors[draw(names(files))] = files.tensors[name].clone()


def removed(draw: st.DrawFn, files: Files) -> None:
    del files.tensors[picked(draw, files)]


def truncated(draw: st.DrawFn, files: Files) -> None:
    share, which = draw(st.floats(0, 1)), draw(st.integers(0, 1))

    def cut(made: dict[str, bytearray]) -> None:
        content = made[sorted(made)[which % len(made)]]
        del content[int(len(content) * share) :]

    files.late.append(cut)


def flipped(draw: st.DrawFn, files: Files) -> None:
    """Some bytes anywhere, or in the first ones, where the header is."""
    which, near = draw(st.integers(0, 1)), draw(st.booleans())
    flips = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))

    def flip(made: dict[str, bytearray]) -> None:
        content = made[sorted(made)[which % len(made)]]
        reach = min(len(content), 400) if near else len(content)
        for share, mask in flips if reach else ():
            content[int(reach * share)] ^= mask

    files.late.append(flip)


def misdescribed(draw: st.DrawFn, files: Files) -> None:
    """An entry of the safetensors header that says what is not so."""
    name, key = picked(draw, files), draw(st.sampled_from(("shape", "dtype", "data_offsets")))
    value = draw(st.sampled_from((["F32"], "F64", "F4", "I64", [1 << 40], [0], [-1], [1 << 62, 8], [0, 1 << 50], None)))

    def rewrite(made: dict[str, bytearray]) -> None:
        content = made.get(files.layout.tensors)
        if content is not None:
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            if name in header:
                header[name][key] = value
            told = json.dumps(header).encode()
            content[: 8 + size] = len(told).to_bytes(8, "little") + told

    files.late.insert(0, rewrite)


def pickled(draw: st.DrawFn, files: Files) -> None:
    """The same as an archive of torch.save, its bytes flipped."""
    files.pickled = True
    flipped(draw, files)


SPOILS = (
    *(replaced_value, replaced_inside, removed_key, other_type, reshaped, retyped, renumbered, renamed, duplicated),
    *(removed, truncated, flipped, misdescribed, pickled),
)


def replaced_deep(draw: st.DrawFn, files: Files) -> None:
    """One entry of a converted delta's config, however deep: another value, another name, once more, or gone."""
    files.config = inner = json.loads(json.dumps(files.config))
    for _ in range(draw(st.integers(0, 5))):
        entries = list(inner.values()) if isinstance(inner, dict) else inner
        deeper = [value for value in entries if isinstance(value, list | dict) and value]
        if deeper:
            inner = draw(st.sampled_from(deeper))
    place = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    match draw(st.sampled_from(("value", "name", "gone", "again"))):
        case "value":
            inner[place] = draw(VALUES | st.sampled_from([*PRIMITIVES, *sorted(files.tensors)]))
        case "gone":
            del inner[place]
        case "name" if isinstance(inner, dict):
            inner[draw(WORDS)] = inner.pop(place)
        case _ if isinstance(inner, dict):
            inner[draw(WORDS)] = inner[place]
        case _:
            inner.append(inner[place])


def hub_option(draw: st.DrawFn, files: Files) -> None:
    """One of the options of a method of AdapterHub's, of its own or of another."""
    files.config = json.loads(json.dumps(files.config))
    told = files.config.get("config")
    parts = told.get("configs", [told]) if isinstance(told, dict) else []
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    if parts:
        value = VALUES | st.sampled_from(
            ("learned", "channel", "nice", "reft", "lora", "prefix_tuning", None, True, False)
        )
        draw(st.sampled_from(parts))[draw(st.sampled_from(HUB_OPTIONS))] = draw(value)


HUB_OPTIONS = sorted(set().union(*(options.used | options.inert for options in ARCHITECTURES.values())))
WORDS = st.sampled_from(("a", "b", "scale", "index", "values", "weight", "bias", "keys", "rows", "type", "x", "\ud800"))
NATIVE_SPOILS = (
    *(replaced_deep, replaced_deep, replaced_deep, removed_key, replaced_value),
    *(reshaped, retyped, renumbered, renamed, duplicated, removed, truncated, flipped, misdescribed),
)
HUB_SPOILS = (
    *(replaced_deep, replaced_deep, hub_option, hub_option, removed_key, replaced_value, reshaped, retyped, renumbered),
    *(renamed, duplicated, removed, truncated, flipped, misdescribed, pickled),
)
HUB_LAYOUTS = (layouts.HUB, layouts.HUB_HEAD, layouts.HUB_FUSION, layouts.HUB_SETUP)
SPOILED_BY = {PEFT: SPOILS, OPENDELTA: SPOILS, NATIVE: NATIVE_SPOILS, **dict.fromkeys(HUB_LAYOUTS, HUB_SPOILS)}
TENSORLESS = (replaced_deep, removed_key, replaced_value, truncated, flipped)
