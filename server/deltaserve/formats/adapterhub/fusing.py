"""AdapterFusion's own weights: how each row asks, how members answer, and what is read of them (arXiv 2005.00247)."""

from collections.abc import Mapping

import torch

from deltaserve.deltas.sites import BackboneSpec
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats import options
from deltaserve.formats.adapterhub.member import Below, named
from deltaserve.formats.folder import Folder
from deltaserve.formats.options import Options, shown

OPTIONS = Options(
    used=frozenset({"key", "query", "value", "query_before_ln", "residual_before", "temperature"}),
    # Where the value's product is taken changes nothing: it is linear, and the weights sum to 1.
    inert=frozenset({"architecture", "regularization", "dropout_prob", "value_initialized", "value_before_softmax"}),
)
PRESETS: Mapping[str, Mapping[str, bool]] = {
    "static": {"key": True, "query": True, "value": False},
    "dynamic": {"key": True, "query": True, "value": True},
}

Parts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Query and its bias, key and its bias, value."""


class Fusing:
    """`members` are the names of what it fuses, in its order. All of it is untrusted text, only ever compared."""

    def __init__(self, folder: Folder, backbone: BackboneSpec) -> None:
        config = folder.config()
        self.name = named(config)
        self.folder = folder
        self.tensors = Below(folder, backbone)
        told = config.get("config")
        if isinstance(told, str) and told in PRESETS:
            told = PRESETS[told]
        if not isinstance(told, dict):
            raise BadCheckpoint(f"config key 'config' of a fusion is {shown(told)}; an object is expected")
        OPTIONS.check(told)
        self._told = told
        names = config.get("adapter_names", self.name)
        names = names.split(",") if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise BadCheckpoint(f"config key 'adapter_names' is {shown(names)}; a list of names is expected")
        self.members = tuple(names)
        self.query_before_ln = options.flag(told, "query_before_ln")
        self.residual_before = options.flag(told, "residual_before")
        if options.flag(told, "temperature"):
            raise options.not_served(
                "temperature",
                True,
                "the library lowers it at each forward, at inference too, and does not save how far it has come",
            )
        if not any(options.flag(told, key) for key in ("key", "query", "value")):
            raise FailedPrecondition(
                "a fusion without key, query and value has no weights to fuse with; the library cannot run it",
                reason="OPTION_NOT_SERVED",
                metadata={"key": "key"},
            )

    def at(self, module: str, hidden: int) -> Parts:
        """Its tensors at one place."""
        at = f"{module}.adapter_fusion_layer.{self.name}"
        query, query_bias = self._pair(at, "query", hidden)
        key, key_bias = self._pair(at, "key", hidden)
        value = self.tensors.take(f"{at}.value.weight", (hidden, hidden)) if options.flag(self._told, "value") else None
        return query, query_bias, key, key_bias, value

    def _pair(self, at: str, word: str, hidden: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not options.flag(self._told, word):
            return None, None
        weight = self.tensors.take(f"{at}.{word}.weight", (hidden, hidden))
        return weight, self.tensors.take(f"{at}.{word}.bias", (hidden,))
