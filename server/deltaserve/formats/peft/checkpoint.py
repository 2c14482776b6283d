"""A PEFT checkpoint beside the backbone that it is lowered for: every tensor is taken once, by name and shape."""

from collections.abc import Mapping
from typing import Any

from deltaserve.deltas.sites import BackboneSpec, HeadSpec, Pooling, Task
from deltaserve.errors import BadCheckpoint
from deltaserve.formats.folder import Folder
from deltaserve.formats.ledger import Ledger
from deltaserve.formats.options import shown
from deltaserve.formats.wanted import Wanted
from deltaserve.formats.work import UNLIMITED, Work

_HEADED = {
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "QUESTION_ANS": Task.QUESTION_ANSWERING,
}
_HEADLESS = frozenset({*_HEADED, "FEATURE_EXTRACTION"})
"""Tasks whose classes have no lm_head."""


class Checkpoint(Ledger):
    """`config` and tensors; names of modules are canonical (those of the backbone's sites) everywhere outside.

    `dotted` lists what PEFT may have put before the module path of a tensor, the longest first.
    """

    def __init__(
        self,
        folder: Folder,
        config: Mapping[str, Any],
        backbone: BackboneSpec,
        wanted: Wanted,
        dotted: tuple[str, ...],
        work: Work = UNLIMITED,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.wanted = wanted
        self.folder = folder
        self.work = work
        super().__init__(folder.tensors(), lambda name: _stripped(name, dotted))
        start = backbone.prefix + "."
        self._children = {
            name.removeprefix(start).partition(".")[0] for name in backbone.modules if name.startswith(start)
        }
        self._base = self._base_name()
        if self._base not in (backbone.prefix, ""):
            self.warn(
                f"its class calls the base model {self._base!r}, so that transformers finds no weights for it in the "
                "checkpoint of a causal language model: if it was trained from one, then on random numbers"
            )
        if self._base != backbone.prefix:
            self._left = {self.name(short): name for short, name in self._left.items()}
        self._warn_of_another_backbone()

    @property
    def modules(self) -> tuple[str, ...]:
        """The names under which the checkpoint's own model knew its modules, for matching; see `site`."""
        if self._base == self.backbone.prefix:
            return self.backbone.modules
        return tuple(self.own(name) for name in self.backbone.modules if name.startswith(self.backbone.prefix + "."))

    def name(self, module: str) -> str:
        """The canonical name of one of `modules`, or of what is below one; another name as it is."""
        if self._base:
            inside = module.startswith(self._base + ".")
            return self.backbone.prefix + module.removeprefix(self._base) if inside else module
        inside = module.partition(".")[0] in self._children
        return f"{self.backbone.prefix}.{module}" if inside and self.backbone.prefix else module

    def own(self, module: str) -> str:
        """The checkpoint's name of a canonical module."""
        start = self.backbone.prefix + "."
        if self._base == self.backbone.prefix or not module.startswith(start):
            return module
        return ".".join(part for part in (self._base, module.removeprefix(start)) if part)

    def may_lack(self, module: str) -> bool:
        """Whether the class that was trained may not have had this module, and the checkpoint has nothing for it."""
        top = module.removeprefix(self.backbone.prefix + ".").partition(".")[0]
        task = self.config.get("task_type")
        if top == "lm_head":
            absent = task is None or task in _HEADLESS
        elif top == "pooler":
            head = self._trained_head()
            absent = task != "FEATURE_EXTRACTION" and (head is None or head.pooling is not Pooling.POOLER)
        else:
            absent = False
        return absent and not self.below(module)

    def _trained_head(self) -> HeadSpec | None:
        """The head of the class that was trained, as far as the config or the operator says which that was."""
        told = self.config.get("task_type")
        task = self.wanted.task if told is None else _HEADED.get(told) if isinstance(told, str) else None
        return None if task is None else self.backbone.heads.get(task)

    def _base_name(self) -> str:
        """What the class that was trained calls its base model; empty where the bare base model was saved."""
        usual = self.backbone.prefix
        trained = self._trained_head()
        likely = usual if trained is None or trained.base is None else trained.base
        others = [head.base for head in self.backbone.heads.values() if head.base is not None]
        for base in (likely, usual, *others):
            if any(name.startswith(base + ".") for name in self._left):
                return base
        known = set(self.backbone.modules)
        bare = any(f"{usual}.{name.rsplit('.', cut)[0]}" in known for name in self._left for cut in (1, 2, 3))
        return "" if usual and bare else likely

    def _warn_of_another_backbone(self) -> None:
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            return
        theirs, ours = (text.rstrip("/").rpartition("/")[2].lower() for text in (base, self.backbone.name))
        if theirs != ours:
            self.warn(f"made for {base[:200]!r}; this backbone is {self.backbone.name!r}")


def _stripped(name: str, dotted: tuple[str, ...]) -> str:
    start = next((start for start in dotted if name.startswith(start)), None)
    if start is None:
        raise BadCheckpoint(
            f"tensor {shown(name)} does not begin with {dotted[0]!r} as PEFT's do", metadata={"tensor": shown(name)}
        )
    return name.removeprefix(start)
