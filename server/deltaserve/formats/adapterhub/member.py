"""One adapter of AdapterHub's: what its config says, and its tensors, each taken once by the place that it is for."""

from collections.abc import Mapping
from typing import Any

import torch

from deltaserve.deltas.sites import BackboneSpec
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.configs import Part, parts
from deltaserve.formats.adapterhub.places import Places
from deltaserve.formats.folder import HUB_INTERFACE, Folder
from deltaserve.formats.ledger import Ledger
from deltaserve.formats.options import shown

MOST_NAME = 200
_LEGACY = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}
"""Words of adapter-transformers, and what they became."""


class Below(Ledger):
    """Tensors by their names in the library's base model, without what a class of a whole model puts before them."""

    def __init__(self, folder: Folder, backbone: BackboneSpec) -> None:
        self._start = (backbone.prefix or "transformer") + "."
        super().__init__(folder.tensors(), self._stripped)

    def _stripped(self, name: str) -> str:
        return ".".join(_LEGACY.get(word, word) for word in name.removeprefix(self._start).split("."))

    def number(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in fp32, for arithmetic."""
        return self.take(name, shape).float()

    def sizes(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that may be missing: then ()."""
        return self.shape(name) if self.has(name) else ()


class Member:
    """`name` is untrusted text: it is compared with names of tensors, and nothing else is made of it."""

    def __init__(self, folder: Folder, backbone: BackboneSpec) -> None:
        config = folder.config()
        self.folder = folder
        self.config = config
        self.name = named(config)
        self.tensors = Below(folder, backbone)
        self.parts = parts(config)
        self._shared: dict[str, torch.Tensor] = {}
        self.places = Places(backbone, folder.told(HUB_INTERFACE))
        _check_backbone(self.tensors, config, backbone)

    def of(self, architecture: str | None) -> tuple[Part, ...]:
        """Its parts of an architecture; LoRA's are those of MTL-LoRA too."""
        alike = ("lora", "mtl_lora") if architecture == "lora" else (architecture,)
        return tuple(part for part in self.parts if part.architecture in alike)

    def shared(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that all layers have in common, fp32. Raises FailedPrecondition where the file has none of these."""
        if name not in self._shared:
            start = f"shared_parameters.{self.name}"
            if not self._shared and not self.tensors.below(start):
                raise FailedPrecondition(
                    f"the checkpoint of {shown(self.name)} has no {start[:100]!r}: the library loses what layers share "
                    "when it saves from T5ForConditionalGeneration; save it from T5AdapterModel",
                    reason="INCOMPLETE_CHECKPOINT",
                )
            self._shared[name] = self.tensors.number(name, *shape)
        found = self._shared[name]
        if tuple(found.shape) != shape:
            raise BadCheckpoint(
                f"tensor {shown(name)} has shape {list(found.shape)}; another layer needs {list(shape)} of it"
            )
        return found

    def part(self, found: list[Part], where: str) -> Part | None:
        """The one of several parts that is for a place. Raises BadCheckpoint where two are."""
        if len(found) > 1:
            raise BadCheckpoint(f"two parts of the config of {shown(self.name)} are for {where!r}")
        return found[0] if found else None


def named(config: Mapping[str, Any]) -> str:
    """The name under which an adapter, a fusion or a head was saved. Raises BadCheckpoint."""
    name = config.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME:
        raise BadCheckpoint(f"config key 'name' is {shown(name)}; 1 to {MOST_NAME} characters are expected")
    return name


def _check_backbone(tensors: Below, config: Mapping[str, Any], backbone: BackboneSpec) -> None:
    kind, width = config.get("model_type"), config.get("hidden_size")
    if isinstance(kind, str) and kind.removesuffix("_text") != backbone.family:
        raise BadCheckpoint(
            f"config key 'model_type' is {shown(kind)}: the adapter was made for another kind of backbone than this "
            f"{backbone.family}",
            metadata={"key": "model_type"},
        )
    if width is not None and width != backbone.hidden_size:
        raise BadCheckpoint(
            f"config key 'hidden_size' is {shown(width)}; this backbone has {backbone.hidden_size}",
            metadata={"key": "hidden_size"},
        )
    base = config.get("model_name")
    if isinstance(base, str) and base:
        theirs, ours = (text.rstrip("/").rpartition("/")[2].lower() for text in (base, backbone.name))
        if theirs != ours:
            tensors.warn(f"made for {base[:200]!r}; this backbone is {backbone.name!r}")


def only(part: Part, key: str, value: Any) -> None:
    """Raises FailedPrecondition for an option that has another value than the one that is served."""
    if part.told.get(key) != value:
        raise options.not_served(key, part.told.get(key), f"this release serves {value!r}")
