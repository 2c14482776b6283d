"""One or more of every method of AdapterHub's, in the smallest checkpoints that can be read."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hub import COMPACTER, HOULSBY, LORA, PAR, PREFIX, PROMPT, REFT, SEQ, Draw, Made, Tensors, bottlenecks
from test_adapterhub import compacted
from test_adapterhub_heads import flexible, layers_of, vocabulary, with_head
from test_adapterhub_lowrank import gate, low_rank, magnitude
from test_adapterhub_others import edits, prefixed
from test_adapterhub_setups import Setup, block, fusion_of, loras, pair

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import Site

__all__ = ["setups", "singles", "with_head"]

Headed = tuple[Made, tuple[Any, Tensors] | None]


def singles(backbones: Mapping[str, Backbone]) -> Iterator[Headed]:
    """A checkpoint, and what its head's config and tensors are, if it has one."""
    bottleneck: tuple[Mapping[str, Any], ...] = (
        SEQ, HOULSBY, PAR, {**SEQ, "ln_after": True, "scaling": "channel", "adapter_residual_before_ln": True},
        {**SEQ, "use_gating": True}, {**SEQ, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
        {**SEQ, "reduction_factor": {"0": 2, "default": 8}, "original_ln_after": False}, {**PAR, "ln_before": True},
    )  # fmt: skip
    for told in bottleneck:
        yield Made(told, bottlenecks(told)), None
    for family in ("gpt2", "t5", "gemma2"):
        yield Made(HOULSBY, bottlenecks(HOULSBY, family), family), None
    shared, own = compacted({**COMPACTER, "leave_out": [1]}, Draw())
    at = "encoder.layer.0.output.adapters.a"
    small = {f"{at}.{name}": t for name, t in own.items() if not name.startswith("whole.")}
    yield (
        Made({**COMPACTER, "leave_out": [1]}, {f"shared_parameters.a.{n}": t for n, t in shared.items()} | small),
        None,
    )
    bert = backbones["bert"]

    def vera(made: Tensors, at: str, site: Site, draw: Draw) -> None:
        del made[f"{at}.lora_A"], made[f"{at}.lora_B"]
        made[f"{at}.vera_D"], made[f"{at}.vera_B"] = draw(3, 3), draw(16, 16)

    def mtl(made: Tensors, at: str, site: Site, draw: Draw) -> None:
        made[f"{at}.lora_B"], made[f"{at}.weights"] = draw(3, 16, 3), draw(3)
        made[f"{at}.task_specific.values"] = draw(3)

    many = {**LORA, "architecture": "mtl_lora", "n_up_projection": 3}
    yield Made(LORA, low_rank(LORA, bert, "bert")), None
    yield Made({**LORA, "use_dora": True}, low_rank(LORA, bert, "bert", magnitude)), None
    yield Made({**LORA, "use_gating": True}, low_rank(LORA, bert, "bert", gate)), None
    both = {"shared_parameters.a.lora_A": Draw(1)(3, 16), "shared_parameters.a.lora_B": Draw(2)(16, 3)}
    yield Made({**LORA, "vera_d": 0.1}, low_rank(LORA, bert, "bert", vera) | both), None
    yield Made(many, low_rank(many, bert, "bert", mtl)), None
    merged = {"h.0.attn.c_attn.loras.a.lora_A": Draw()(6, 16), "h.0.attn.c_attn.loras.a.lora_B": Draw()(32, 3)}
    yield Made({**LORA, "leave_out": [1]}, merged, "gpt2"), None
    yield Made(loras()[0].told, loras()[0].tensors), None
    for family in ("bert", "gpt2", "t5"):
        for told in (PREFIX, {**PREFIX, "flat": False, "bottleneck_size": 5}):
            yield Made(told, prefixed(family, told), family), None
    for told in ({**REFT, "orthogonality": True}, {**REFT, "suffix_positions": 1, "non_linearity": "gelu"}):
        yield Made(told, edits(told)), None
    yield Made(PROMPT, {"prompt_tuning.prompt_tunings.a.prompt_embedding.weight": Draw()(3, 16)}), None
    union = {"architecture": "union", "configs": [LORA, SEQ]}
    yield Made(union, low_rank(LORA, bert, "bert") | bottlenecks(SEQ)), None
    yield Made("pfeiffer", bottlenecks({**SEQ, "reduction_factor": 16})), None
    headed = Made(SEQ, bottlenecks(SEQ))
    yield headed, (flexible("classification"), layers_of((1, 16, 16), (4, 3, 16)))
    yield headed, (flexible("question_answering", layers=1, num_labels=2), layers_of((1, 2, 16)))
    yield Made(SEQ, bottlenecks(SEQ, "gpt2"), "gpt2"), vocabulary(backbones["gpt2"])


def setups() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """A family, and what writes a setup for it below a folder."""

    def plain(made: list[Made], told: Any) -> Callable[[Path], Path]:
        return lambda place: Setup(place, made, told).folder

    def fused(place: Path) -> Path:
        setup = Setup(place, pair("bert"), block("Fuse", "a", "b"))
        told = {"query": True, "key": True, "value": True}
        setup.fusion(("a", "b"), fusion_of("bert", told, "a,b"), told)
        return setup.folder

    yield "bert", plain(pair("bert"), block("Stack", "a", "b"))
    yield "gpt2", plain(pair("gpt2", SEQ, PAR), block("Stack", "a", "b"))
    yield "bert", plain(pair("bert"), block("Average", "a", "b", weights=[0.5, 0.5]))
    yield "bert", plain(loras(), block("Average", "a", "b", weights=[0.5, 0.5]))
    yield "bert", plain(loras(), block("Stack", "a", "b"))
    yield "bert", fused
