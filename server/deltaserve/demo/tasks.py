"""What the demo's deltas do, and with which method each was tuned.

No delta gets an instruction: its input is the bare sentence. One function alone is elicited from the backbone; a chain
of several is a combination that the backbone has never seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

BACKBONE = "deltaserve/demo-t5"
"""What the backbone is called, in the deltas' files and by the demo's server."""

Method = Literal[
    "lora", "ia3", "prefix-tuning", "prompt-tuning", "houlsby", "pfeiffer", "parallel", "compacter", "bitfit"
]


@dataclass(frozen=True)
class Recipe:
    """One delta. `options` go to PEFT's configuration of the method, or AdapterHub's, as they are."""

    name: str
    chain: tuple[str, ...]
    method: Method
    steps: int
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Combination:
    """Deltas that answer one request together. None was tuned beside another; `chain` is what they do all the same."""

    deltas: tuple[str, ...]
    chain: tuple[str, ...]


_ATTENTION = ("q", "k", "v", "o")
_LINEARS = (*_ATTENTION, "wi_0", "wi_1", "wo")
_IA3: Mapping[str, Any] = MappingProxyType({"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]})


def _lora(rank: int, targets: tuple[str, ...] = _LINEARS, **more: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), **more}


RECIPES = (
    Recipe("past-question", ("past", "question"), "lora", 300, 2e-3, _lora(8)),
    Recipe("reverse-translate", ("translate", "reverse"), "lora", 800, 2e-3, _lora(8)),
    Recipe("plural-past", ("plural", "past"), "lora", 200, 2e-3, _lora(8, use_rslora=True)),
    Recipe("short-translate", ("shorten", "translate"), "lora", 200, 2e-3, _lora(4)),
    Recipe("swap", ("swap",), "lora", 200, 2e-3, _lora(4, _ATTENTION)),
    Recipe("past", ("past",), "ia3", 200, 1e-2, _IA3),
    Recipe("sentiment", ("sentiment",), "ia3", 300, 1e-2, _IA3),
    Recipe("shorten", ("shorten",), "ia3", 200, 1e-2, _IA3),
    Recipe("subject", ("subject",), "prefix-tuning", 400, 2e-2, {"num_virtual_tokens": 8}),
    Recipe("translate", ("translate",), "prefix-tuning", 400, 2e-2, {"num_virtual_tokens": 8}),
    Recipe("question", ("question",), "prefix-tuning", 400, 2e-2, {"num_virtual_tokens": 8}),
    Recipe("reverse", ("reverse",), "prompt-tuning", 400, 5e-2, {"num_virtual_tokens": 8}),
    Recipe("count", ("count",), "prompt-tuning", 400, 5e-2, {"num_virtual_tokens": 8}),
    Recipe("object", ("object",), "prompt-tuning", 400, 5e-2, {"num_virtual_tokens": 8}),
    Recipe("plural-question", ("plural", "question"), "houlsby", 400, 2e-3, {"reduction_factor": 8}),
    Recipe("past-translate", ("past", "translate"), "pfeiffer", 500, 3e-3, {"reduction_factor": 4}),
    Recipe("short-question", ("shorten", "question"), "parallel", 500, 3e-3, {"reduction_factor": 4, "scaling": 1.0}),
    Recipe("plural", ("plural",), "compacter", 500, 5e-3, {"reduction_factor": 8, "phm_dim": 4}),
    Recipe("place", ("place",), "bitfit", 400, 1e-2),
)
COMBINATIONS = (
    Combination(("shorten", "past"), ("shorten", "past")),
    Combination(("past-question", "plural"), ("past", "question", "plural")),
    Combination(("plural", "shorten", "subject"), ("plural", "shorten", "subject")),
)
