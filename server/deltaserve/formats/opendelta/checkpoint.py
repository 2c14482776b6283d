"""An OpenDelta checkpoint beside the backbone that it is lowered for.

Its tensors stand below the names of the backbone's modules, and the word behind a module's name says of what method
they are: `encoder.layer.0.output.dense.adapter.modulelist.down_proj.weight`. Tensors without such a word are the
backbone's own, which were left to be trained.
"""

from collections.abc import Mapping
from typing import Any

from deltaserve.deltas.sites import BackboneSpec, Weights
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.folder import Folder
from deltaserve.formats.ledger import Ledger
from deltaserve.formats.options import shown
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.work import UNLIMITED, Work

WORDS = (
    *("adapter", "compactor", "low_rank_adapter", "lora", "parallel_adapter", "prefix", "reparams"),
    *("soft_prompt_layer", "bitfit"),
)
"""`compactor` is how the library spells it."""


class Checkpoint(Ledger):
    """`config` and tensors; names of modules are canonical, those of the backbone's sites.

    `found[word]`: the modules below which a method's tensors stand, in the file's order; "" is the model itself.
    """

    def __init__(
        self,
        folder: Folder,
        config: Mapping[str, Any],
        backbone: BackboneSpec,
        weights: Weights,
        wanted: Wanted,
        work: Work = UNLIMITED,
    ) -> None:
        self.folder = folder
        self.config = config
        self.backbone = backbone
        self.weights = weights
        self.wanted = wanted
        self.work = work
        start = backbone.prefix + "."
        self._children = {
            name.removeprefix(start).partition(".")[0] for name in backbone.modules if name.startswith(start)
        }
        self._bases = tuple({f"{head.base}." for head in backbone.heads.values() if head.base is not None})
        super().__init__(folder.tensors(), self.name)
        found: dict[str, dict[str, None]] = {}
        for name in self.names():
            module, word = _worded(name)
            if word is not None:
                found.setdefault(word, {})[module] = None
        self.found = {word: tuple(modules) for word, modules in found.items()}
        if not self.names():
            raise BadCheckpoint(
                "the checkpoint holds no tensor at all: OpenDelta writes such a file where its config's modules match "
                "nothing in the model, as those of LoRA do in GPT-2"
            )
        self._warn_of_another_backbone()

    @property
    def type(self) -> object:
        """The one method whose config the library keeps, whatever others have tensors here."""
        return self.config.get("delta_type")

    def name(self, own: str) -> str:
        """The canonical name of what the class that was trained called so: it may have been the bare base model."""
        prefix = self.backbone.prefix
        if not prefix or own.startswith(prefix + "."):
            return own
        for base in self._bases:
            if own.startswith(base):
                return f"{prefix}.{own.removeprefix(base)}"
        return f"{prefix}.{own}" if own.partition(".")[0] in self._children else own

    def bare(self, name: str) -> str:
        """A canonical name as the base model has it."""
        return name.removeprefix(self.backbone.prefix + ".") if self.backbone.prefix else name

    def _warn_of_another_backbone(self) -> None:
        base = self.config.get("backbone_checkpoint_name")
        if not isinstance(base, str) or not base:
            return
        theirs, ours = (text.rstrip("/").rpartition("/")[2].lower() for text in (base, self.backbone.name))
        if theirs != ours:
            self.warn(f"made for {base[:200]!r}; this backbone is {self.backbone.name!r}")


def _worded(name: str) -> tuple[str, str | None]:
    """The module, and the last of its words that is a method's."""
    parts = name.split(".")
    at = next((at for at in reversed(range(len(parts))) if parts[at] in WORDS), None)
    return (name, None) if at is None else (".".join(parts[:at]), parts[at])


def unserved(module: str, why: str) -> BadCheckpoint:
    """The error for a module of the file that this backbone does not have as it should be."""
    return BadCheckpoint(f"tensors stand below {shown(module)}: {why}", metadata={"module": module[:200]})
