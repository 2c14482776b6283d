"""Deltas of every kind at the sizes they have in life: made by PEFT, saved, lowered as any checkpoint is."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from bench import adapters, deltas, shapes
from deltaserve.backbone.model import Backbone
from deltaserve.deltas.delta import Delta, mapped
from deltaserve.deltas.sites import BackboneSpec
from deltaserve.formats.registry import read

PROMPT = 20
"""Virtual tokens of prefixes and prompts."""
EVERYWHERE, FEW = "all linears", "query, value"
_NOISE = 0.02


@dataclass(frozen=True)
class Kind:
    """`config(tokens)` is PEFT's; `tokens` are ids that the inputs have. `at`: what it targets, for the reader.

    `rows`: soft-prompt rows of each request. `headed`: it is made on the classifier, and has its head. `make`: of kinds
    that are no PEFT's, for a spec and a seed.
    """

    name: str
    at: str
    config: Callable[[Sequence[int]], Any] = lambda _: None
    rows: int = 0
    headed: bool = False
    make: Callable[[BackboneSpec, int], Delta] | None = None


def _tuner(name: str, word: str, at: str = EVERYWHERE, **told: Any) -> Kind:
    """PEFT's own targets are the queries and values, of every kind here."""
    return Kind(name, at, lambda _: getattr(peft, f"{word}Config")(**told))


def _tokens(ids: Sequence[int]) -> Any:
    embedding = r".*(word_embeddings|embed_tokens)"
    return peft.TrainableTokensConfig(target_modules=embedding, token_indices=sorted(set(ids)))


MIX = (
    _tuner("lora", "Lora", r=8),
    _tuner("dora", "Lora", r=8, use_dora=True),
    _tuner("adalora", "AdaLora", init_r=12, target_r=8, total_step=100),
    _tuner("hra", "HRA", r=8, apply_GS=False),
    _tuner("ia3", "IA3", at="as PEFT"),
    _tuner("bias", "Beft"),
    Kind("ln-tuning", "norms", lambda _: peft.LNTuningConfig(target_modules=r".*(norm|LayerNorm)")),
    _tuner("oft", "OFT", oft_block_size=32, r=0),
    _tuner("boft", "BOFT", boft_block_size=4),
    _tuner("road", "Road"),
    _tuner("miss", "Miss", at=FEW),
    _tuner("gralora", "Gralora", at=FEW),
    _tuner("vera", "Vera", at=FEW, r=256),
    _tuner("shira", "Shira", at=FEW, r=32),
    Kind("trainable-tokens", "embedding", _tokens),
    Kind("prefix-tuning", "attention", lambda _: peft.PrefixTuningConfig(num_virtual_tokens=PROMPT)),
)
"""Those that are mixed."""
ALONE = (
    _tuner("loha", "LoHa", at=FEW, r=8),
    _tuner("lokr", "LoKr", at=FEW, r=8),
    _tuner("c3a", "C3A", at=FEW, block_size=256),
    _tuner("fourierft", "FourierFT", at=FEW),
)
"""The last three are dense on the device."""
ENCODED = (
    Kind("prompt-tuning", "inputs", lambda _: peft.PromptTuningConfig(num_virtual_tokens=PROMPT), rows=PROMPT),
    Kind("head", "pooled", lambda _: peft.LoraConfig(r=8), headed=True),
)
"""What acts in no decode step."""
ADAPTERS = tuple(
    Kind(name, "sublayers" if name in ("houlsby", "compacter") else "feed-forward", make=make)
    for name, make in adapters.MAKE.items()
)
TINY = tuple(kind for kind in MIX if kind.name in ("lora", "ia3", "ln-tuning", "boft"))
"""Those that a tiny backbone is wide enough for, one for each of a few primitives."""


def of_kind(kind: Kind, backbone: Backbone, shape: str, count: int, tokens: Sequence[int], seed: int) -> list[Delta]:
    """`count` deltas: one that was made, by PEFT or by hand, and the same with its numbers times others.

    Each is in memory of its own; they have what such deltas share (VeRA's projections) in common.
    """
    first = _first(kind, backbone, shape, tokens, seed) if kind.make is None else kind.make(backbone.spec, seed)
    return [_times(first, 1 + number / count / 4) for number in range(count)]


def _first(kind: Kind, backbone: Backbone, shape: str, tokens: Sequence[int], seed: int) -> Delta:
    with tempfile.TemporaryDirectory() as place:
        _save(kind, backbone, shape, tokens, seed, Path(place))
        return read(Path(place), backbone.spec, backbone.weights)


def _times(delta: Delta, factor: float) -> Delta:
    def one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * factor if tensor.is_floating_point() else tensor.clone()

    return mapped(delta, one, delta.bases)


def _save(kind: Kind, backbone: Backbone, shape: str, tokens: Sequence[int], seed: int, place: Path) -> None:
    """Every number that PEFT would train is moved off its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: Any = shapes.sharing(shape, backbone, headed=kind.headed)
        config = kind.config(tokens)
        if kind.at == EVERYWHERE:
            endings = sorted({site.name.rpartition(".")[2] for site in deltas.linears(backbone.spec)})
            # As a pattern: PEFT shortens a list to endings, and an encoder's pooler would match those.
            config.target_modules = rf".*layers?\.\d+\..*({'|'.join(endings)})"
        tasks = {True: "FEATURE_EXTRACTION", False: "CAUSAL_LM"}
        config.task_type = "SEQ_CLS" if kind.headed else tasks[backbone.family.base_only]
        made = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
        made.save_pretrained(place)
