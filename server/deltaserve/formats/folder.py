"""The files of a checkpoint: a JSON config and named tensors. Everything is bounded before it is read.

Nothing is unpickled. A `.bin` file is read only if the operator allows it, and then as weights alone.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
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

MOST_CONFIG_BYTES = 1 << 20
MOST_DELTA_BYTES = 16 << 20
"""Of our own config, which names each primitive at each site, and up to 100,000 labels."""
MOST_TENSOR_BYTES = 32 << 30
MOST_TENSORS = 100_000
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How files of a checkpoint are called. `beside`: a file that may be there and counts as content."""

    config: str
    tensors: str
    pickled: str | None = None
    beside: str | None = None
    most_config_bytes: int = MOST_CONFIG_BYTES


PEFT = Layout(CONFIG, SAFETENSORS, PICKLED, MODEL_CONFIG)
NATIVE = Layout("delta.json", "delta.safetensors", most_config_bytes=MOST_DELTA_BYTES)
LAYOUTS = (PEFT, NATIVE)


class Tensors(Protocol):
    """Named tensors of a file; shapes are known before bytes are read."""

    def names(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> torch.Tensor: ...


class Folder:
    """One checkpoint on disk. Raises BadCheckpoint where it is none, FailedPrecondition for a `.bin` not allowed."""

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        configs = " or ".join(layout.config for layout in LAYOUTS)
        if not path.is_dir():
            raise BadCheckpoint(f"{path.name!r} is not a folder; a checkpoint is the folder that holds {configs}")
        found = [layout for layout in LAYOUTS if (path / layout.config).is_file()]
        if not found:
            raise BadCheckpoint(f"{path.name!r} holds no {configs}: no checkpoint of PEFT's and no converted delta")
        if len(found) > 1:
            raise BadCheckpoint(
                f"{path.name!r} holds {' and '.join(layout.config for layout in found)}: give each a folder of its own"
            )
        self.path = path
        (self.layout,) = found
        self._config = path / self.layout.config
        self._tensors = _tensor_file(path, self.layout, allow_pickle)
        size = self._tensors.stat().st_size
        if size > MOST_TENSOR_BYTES:
            raise BadCheckpoint(f"{self._tensors.name} has {size} bytes; {MOST_TENSOR_BYTES} are read at most")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor file."""
        return self._tensors.stat().st_size

    def content_hash(self) -> str:
        """SHA-256 over the names and bytes of the files that are read, in hexadecimal."""
        digest = hashlib.sha256()
        beside = [] if self.layout.beside is None else [self.path / self.layout.beside]
        for file in (self._config, *beside, self._tensors):
            if file.is_file():
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    def config(self) -> Mapping[str, Any]:
        return _json(self._config, self.layout.most_config_bytes)

    def model_config(self) -> Mapping[str, Any]:
        """transformers' config of the model that was trained; empty where there is none."""
        file = self.path / MODEL_CONFIG
        return _json(file) if file.is_file() else {}

    def tensors(self) -> Tensors:
        found = _Safe(self._tensors) if self._tensors.name == self.layout.tensors else _Pickled(self._tensors)
        count = sum(1 for _ in found.names())
        if count > MOST_TENSORS:
            raise BadCheckpoint(f"{self._tensors.name} has {count} tensors; {MOST_TENSORS} are read at most")
        return found


def _tensor_file(path: Path, layout: Layout, allow_pickle: bool) -> Path:
    if (path / layout.tensors).is_file():
        return path / layout.tensors
    if layout.pickled is None or not (path / layout.pickled).is_file():
        raise BadCheckpoint(f"{path.name!r} holds no {layout.tensors}")
    if not allow_pickle:
        raise FailedPrecondition(
            f"{path.name!r} holds {layout.pickled}, a pickle archive; save it as safetensors, or start the server with "
            "--allow-pickle-archives to have its weights read",
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
        # A view may claim more numbers than the file has.
        claimed = sum(t.numel() * t.element_size() for t in found.values())
        if claimed > 2 * file.stat().st_size:
            raise BadCheckpoint(f"{file.name}: its tensors claim {claimed} bytes, more than the file holds")
        self._found: dict[str, torch.Tensor] = found

    def names(self) -> Iterator[str]:
        yield from self._found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._found[name].shape)

    def get(self, name: str) -> torch.Tensor:
        return self._found[name].detach()
