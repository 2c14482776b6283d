"""OpenDelta's checkpoints in a real engine: what the library answered, to each alone and to all of them in one batch.

The references are whole forwards without a cache (tests/parity/make): alone is prefill and decode, greedy.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from oracle import Oracle
from versus import Versus

from deltaserve.backbone.load import load
from deltaserve.errors import BadCheckpoint, FailedPrecondition
from deltaserve.formats.registry import read

Made = Callable[..., Versus]
FAMILIES = ("bert", "t5", "gpt2", "llama", "opt", "roberta", "flan-t5")
COVERING = (
    "adapter", "adapter_sites", "compacter", "low_rank_adapter", "lora", "lora_head", "lora_whole", "parallel_adapter",
    "prefix", "prefix_flat", "soft_prompt", "bitfit", "bitfit_head",
)  # fmt: skip
SHORT = ("bert", "t5")
ALL = pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.long) for family in FAMILIES])
EMPTY = "holds no tensor at all"


@pytest.mark.parametrize("family", SHORT)
def test_mixed(family: str, versus: Made) -> None:
    made = versus("opendelta", family, COVERING)
    assert made.refused == {}
    made.check_mixed()


@pytest.mark.parametrize("family", SHORT)
def test_alone(family: str, versus: Made) -> None:
    made = versus("opendelta", family, COVERING)
    made.check_alone(made.served)


@pytest.mark.timeout(600)
@ALL
def test_every_case_mixed(family: str, versus: Made) -> None:
    made = versus("opendelta", family)
    assert made.refused == {}
    made.check_mixed()


@pytest.mark.timeout(600)
@ALL
def test_every_case_alone(family: str, versus: Made) -> None:
    made = versus("opendelta", family)
    made.check_alone(made.served)


def test_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    """What the library writes where nothing matched."""
    oracle = Oracle("opendelta", "gpt2")
    assert [name for name, row in oracle.cannot.items() if row["saved"]] == ["lora"]
    oracle.unpack(tmp_path)
    backbone = load(str(oracle.backbone), dtype="float32", device="cpu", tokenized=False)
    with pytest.raises(BadCheckpoint, match=EMPTY):
        read(tmp_path / "lora", backbone.spec, backbone.weights, allow_pickle=True)


def test_pickles_are_read_only_if_they_may(versus: Made) -> None:
    made = versus("opendelta", "bert", COVERING)
    for name in made.served:
        with pytest.raises(FailedPrecondition, match="--allow-pickle-archives"):
            made.driven.lower(name)


def test_whole_models_tell_what_was_dropped(versus: Made) -> None:
    delta = versus("opendelta", "bert", COVERING).driven.deltas["lora_whole"]
    assert any("equal" in warning for warning in delta.provenance.warnings), delta.provenance.warnings
