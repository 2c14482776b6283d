"""The files of a checkpoint: a JSON config and named tensors. Everything is bounded before it is read.

Nothing is unpickled. A `.bin` file is read only if the operator allows it, and then as weights alone.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from deltaserve.errors import BadCheckpoint, FailedPrecondition

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MODEL_CONFIG = "config.json"
"""transformers' own, where a training script left it: the names of labels are in it."""

NATIVE_KEY = "deltaserve_delta"
"""The key of our own config."""

MOST_CONFIG_BYTES = 1 << 20
MOST_DELTA_BYTES = 16 << 20
"""Of our own config, which names each primitive at each site, and up to 100,000 labels."""
MOST_TENSOR_BYTES = 32 << 30
MOST_TENSORS = 100_000
MOST_FOLDERS = 64
"""In one setup of AdapterHub's."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How files of a checkpoint are called, and the config's `key` that only this library writes there.

    `beside`: files that may be there and count as content. `tensors` empty: there are none but in sub-folders, which
    are checkpoints of their own. `advice`: what to do about a pickle archive, by the config.
    """

    config: str
    tensors: str
    key: str
    pickled: str | None = None
    beside: tuple[str, ...] = ()
    most_config_bytes: int = MOST_CONFIG_BYTES
    advice: Callable[[Mapping[str, Any]], str] = lambda _: "save it as safetensors, or " + ALLOW


ALLOW = "start the server with --allow-pickle-archives to have its weights read"


def _hub_advice(config: Mapping[str, Any]) -> str:
    """AdapterHub's library cannot write safetensors where one tensor has several names."""
    parts = [config.get("config")]
    if isinstance(parts[0], dict) and isinstance(parts[0].get("configs"), list):
        parts = parts[0]["configs"]
    for part in parts:
        told = part if isinstance(part, dict) else {"architecture": part}
        if str(told.get("architecture")).startswith("prefix_tuning"):
            return f"AdapterHub's library can save a prefix in no other way: {ALLOW}"
        if told.get("ln_before") is True:
            return f"AdapterHub's library can save an adapter with ln_before in no other way: {ALLOW}"
    return f"save it with use_safetensors=True, or {ALLOW}"


PEFT = Layout(CONFIG, SAFETENSORS, "peft_type", PICKLED, (MODEL_CONFIG,))
HUB_HEAD = Layout("head_config.json", "model_head.safetensors", "model_class", "pytorch_model_head.bin")
HUB_FUSION = Layout(
    "adapter_fusion_config.json", "model_adapter_fusion.safetensors", "config", "pytorch_model_adapter_fusion.bin",
    advice=_hub_advice,
)  # fmt: skip
HUB_INTERFACE = "adapter_interface.json"
HUB = Layout(
    CONFIG,
    "adapter.safetensors",
    "config",
    "pytorch_adapter.bin",
    (HUB_HEAD.config, HUB_HEAD.tensors, str(HUB_HEAD.pickled), HUB_INTERFACE),
    advice=_hub_advice,
)
HUB_SETUP = Layout("adapter_setup.json", "", "adapter_setup")
NATIVE = Layout("delta.json", "delta.safetensors", NATIVE_KEY, most_config_bytes=MOST_DELTA_BYTES)
OPENDELTA = Layout(MODEL_CONFIG, "model.safetensors", "delta_type", "pytorch_model.bin")
LAYOUTS = (PEFT, HUB, HUB_SETUP, HUB_FUSION, NATIVE, OPENDELTA)
"""Of those that share a config's name, the first whose key is in it."""


class Tensors(Protocol):
    """Named tensors of a file; shapes are known before bytes are read."""

    def names(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> torch.Tensor: ...


class Folder:
    """One checkpoint on disk. Raises BadCheckpoint where it is none, FailedPrecondition for a `.bin` not allowed.

    `among`: the layouts that it may have.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False, among: tuple[Layout, ...] = LAYOUTS) -> None:
        configs = " or ".join(dict.fromkeys(layout.config for layout in among))
        if not path.is_dir():
            raise BadCheckpoint(f"{path.name!r} is not a folder; a checkpoint is the folder that holds {configs}")
        found = [layout for layout in among if (path / layout.config).is_file()]
        # transformers' own config may lie beside any other.
        found = [layout for layout in found if layout.config != MODEL_CONFIG] or found
        there = list(dict.fromkeys(layout.config for layout in found))
        if not there:
            raise BadCheckpoint(
                f"{path.name!r} holds no {configs}: no checkpoint of PEFT's, AdapterHub's or OpenDelta's, and no "
                "converted delta"
            )
        if len(there) > 1:
            raise BadCheckpoint(f"{path.name!r} holds {' and '.join(there)}: give each a folder of its own")
        self.path = path
        self._allow_pickle = allow_pickle
        self._config = path / there[0]
        told = _json(self._config, found[0].most_config_bytes)
        layout = next((layout for layout in found if layout.key in told), None)
        if layout is None:
            keys = ", ".join(layout.key for layout in found)
            raise BadCheckpoint(f"the config of {path.name!r} has none of {keys}: it is not known who wrote it")
        self.layout = layout
        self._tensors = _tensor_file(path, layout, told, allow_pickle) if layout.tensors else None
        if self.tensor_bytes > MOST_TENSOR_BYTES:
            raise BadCheckpoint(
                f"{path.name!r} has tensors of {self.tensor_bytes} bytes; {MOST_TENSOR_BYTES} are read at most"
            )

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor file."""
        return 0 if self._tensors is None else self._tensors.stat().st_size

    def content_hash(self) -> str:
        """SHA-256 over the names and bytes of the files that are read, in hexadecimal."""
        digest = hashlib.sha256()
        beside = [self.path / name for name in self.layout.beside]
        for file in (self._config, *beside, *([] if self._tensors is None else [self._tensors])):
            if file.is_file():
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
        for one in self.inside() if self._tensors is None else ():
            digest.update(f"{one.path.name}\0{one.content_hash()}\0".encode())
        return digest.hexdigest()

    def config(self) -> Mapping[str, Any]:
        return _json(self._config, self.layout.most_config_bytes)

    def told(self, name: str) -> Mapping[str, Any]:
        """One of the JSON files beside; empty where there is none."""
        assert name in self.layout.beside
        file = self.path / name
        return _json(file) if file.is_file() else {}

    def model_config(self) -> Mapping[str, Any]:
        """transformers' config of the model that was trained; empty where there is none."""
        return self.told(MODEL_CONFIG)

    def beside(self, layout: Layout) -> "Folder | None":
        """What else this folder holds, of another layout."""
        if not (self.path / layout.config).is_file():
            return None
        return Folder(self.path, allow_pickle=self._allow_pickle, among=(layout,))

    def inside(self) -> "tuple[Folder, ...]":
        """The checkpoints of AdapterHub's in its sub-folders, by name; a link is none. Raises BadCheckpoint."""
        among = (HUB, HUB_FUSION, HUB_HEAD)
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        paths = [self.path / name for name in names]
        found = [path for path in paths if any((path / layout.config).is_file() for layout in among)]
        if len(found) > MOST_FOLDERS:
            raise BadCheckpoint(f"{self.path.name!r} holds {len(found)} checkpoints; {MOST_FOLDERS} are read at most")
        return tuple(self._inner(path) for path in found)

    def _inner(self, path: Path) -> "Folder":
        heads_alone = not any((path / layout.config).is_file() for layout in (HUB, HUB_FUSION))
        return Folder(path, allow_pickle=self._allow_pickle, among=(HUB_HEAD,) if heads_alone else (HUB, HUB_FUSION))

    def tensors(self) -> Tensors:
        assert self._tensors is not None
        found = _Safe(self._tensors) if self._tensors.name == self.layout.tensors else _Pickled(self._tensors)
        count = sum(1 for _ in found.names())
        if count > MOST_TENSORS:
            raise BadCheckpoint(f"{self._tensors.name} has {count} tensors; {MOST_TENSORS} are read at most")
        return found


def _tensor_file(path: Path, layout: Layout, config: Mapping[str, Any], allow_pickle: bool) -> Path:
    if (path / layout.tensors).is_file():
        return path / layout.tensors
    if layout.pickled is None or not (path / layout.pickled).is_file():
        raise BadCheckpoint(f"{path.name!r} holds no {layout.tensors}")
    if not allow_pickle:
        raise FailedPrecondition(
            f"{path.name!r} holds {layout.pickled}, a pickle archive; {layout.advice(config)}",
            reason="PICKLE_NOT_ALLOWED",
        )
    return path / layout.pickled


def _json(file: Path, most: int = MOST_CONFIG_BYTES) -> Mapping[str, Any]:
    size = file.stat().st_size
    if size > most:
        raise BadCheckpoint(f"{file.name} has {size} bytes; {most} are read at most")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{file.name} holds a {type(found).__name__}; an object is expected")
    return found


class _Safe:
    def __init__(self, file: Path) -> None:
        try:
            self._file: Any = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{file.name} is not a safetensors file: {error}") from error

    def names(self) -> Iterator[str]:
        yield from self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        try:
            tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"tensor {name!r} cannot be read: {error}") from error
        assert isinstance(tensor, torch.Tensor)
        return tensor


class _Pickled:
    """An archive of torch.save: its members must be stored as they are, so that none is larger than the file."""

    def __init__(self, file: Path) -> None:
        try:
            with zipfile.ZipFile(file) as archive:
                packed = [m.filename for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise BadCheckpoint(f"{file.name} has compressed members, which torch.save does not write")
            found = torch.load(file, map_location="cpu", weights_only=True)
        except BadCheckpoint:
            raise
        except Exception as error:  # in a damaged archive torch's unpickler stumbles over anything
            raise BadCheckpoint(
                f"{file.name} is not an archive of weights: {str(error).splitlines()[0] if str(error) else error!r}; "
                "save it as safetensors"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(n, str) for n in found):
            raise BadCheckpoint(f"{file.name} holds no dictionary of tensors")
        strays = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if strays:
            raise BadCheckpoint(f"{file.name}: {strays[0]!r} is not a tensor")
        # A view may claim more numbers than the file has; one memory under many names is one memory.
        sizes = {(t.data_ptr(), t.numel() * t.element_size()) for t in found.values()}
        claimed = sum(size for _, size in sizes)
        if claimed > 2 * file.stat().st_size:
            raise BadCheckpoint(f"{file.name}: its tensors claim {claimed} bytes, more than the file holds")
        self._found: dict[str, torch.Tensor] = found

    def names(self) -> Iterator[str]:
        yield from self._found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._found[name].shape)

    def get(self, name: str) -> torch.Tensor:
        return self._found[name].detach()
