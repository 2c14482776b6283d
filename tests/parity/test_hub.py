"""AdapterHub's checkpoints in a real engine: what its library answered, to each alone and to all of them in one batch.

The references are whole forwards without a cache (tests/parity/make): alone is prefill and decode, greedy.
"""

from collections.abc import Callable, Mapping

import pytest
from make.adapterhub_cases import FAMILIES
from methods import ENCODERS
from versus import Versus

from deltaserve.errors import BadCheckpoint, DeltaserveError, FailedPrecondition
from deltaserve.formats.registry import read

Made = Callable[..., Versus]
COVERING = (
    "double_seq_bn", "seq_bn", "seq_bn_resid_after_ln", "seq_bn_ln_before", "seq_bn_ln_after_resid_inside",
    "seq_bn_no_orig_ln_after", "seq_bn_scale_channel", "seq_bn_inv", "par_bn_both", "compacter_own_rule", "lora_all",
    "ia3_alpha", "dora", "prefix_mlp", "prefix_leave_out_0", "prompt_after_bos", "loreft_first", "mam", "unipelt",
    "cross_adapter", "fusion_dynamic", "stack_houlsby_seq", "average_bn", "head_classification", "head_tagging",
)  # fmt: skip
"""Of each kind one, and those that stand in another place: for the short run."""
SHORT = ("bert", "t5", "gpt2", "gemma2")
ALL = pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.long) for family in FAMILIES])
GATED = ("seq_bn_gating", "lora_gating", "prefix_gated", "prefix_gated_two", "unipelt")
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(GATED, "'use_gating' is True: a gate averages over the whole sequence"),
    **dict.fromkeys(("loreft", "loreft_tied"), "'suffix_positions' is 2: the last tokens are others after each"),
}
"""What the library answers by whole forwards and no cache can: not served where tokens are generated."""
REFT_ON_T5 = {"loreft_layer1": "'architecture' is 'reft' and the backbone is t5"}
LOST: Mapping[str, str] = {
    **dict.fromkeys(
        ("compacter", "compacter_pp", "compacter_factor_rule", "compacter_shared_w", "compacter_full_w",
         "compacter_rank2", "vera", "dvora"),
        "the library loses what layers share when it saves from T5ForConditionalGeneration",
    ),
    "fusion_temperature": "'temperature' is True: the library lowers it at each forward",
}  # fmt: skip
"""What the library saved and cannot use itself."""


def expected(family: str) -> Mapping[str, str]:
    return {} if family in ENCODERS else {**REFUSED, **(REFT_ON_T5 if family == "t5" else {})}


def check_refused(made: Versus) -> None:
    """What is not served is what has a reason, and the error says it."""
    reasons = expected(made.oracle.family)
    chosen = {*made.served, *made.refused}
    assert made.refused.keys() == reasons.keys() & chosen
    for name, error in made.refused.items():
        assert isinstance(error, FailedPrecondition) and reasons[name] in str(error), f"{name}: {error}"


@pytest.mark.parametrize("family", SHORT)
def test_mixed(family: str, versus: Made) -> None:
    made = versus("adapterhub", family, COVERING)
    check_refused(made)
    made.check_mixed()


@pytest.mark.parametrize("family", SHORT)
def test_alone(family: str, versus: Made) -> None:
    made = versus("adapterhub", family, COVERING)
    made.check_alone(made.served)


@pytest.mark.timeout(600)
@ALL
def test_every_case_mixed(family: str, versus: Made) -> None:
    made = versus("adapterhub", family)
    check_refused(made)
    made.check_mixed()


@pytest.mark.timeout(600)
@ALL
def test_every_case_alone(family: str, versus: Made) -> None:
    made = versus("adapterhub", family)
    made.check_alone(made.served)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_the_library_cannot_use_itself_is_refused(family: str, versus: Made) -> None:
    made = versus("adapterhub", family, COVERING)
    saved = [name for name, row in made.oracle.cannot.items() if row["saved"]]
    assert saved
    for name in saved:
        backbone = made.driven.backbone
        with pytest.raises(FailedPrecondition, match=LOST[name]):
            read(made.driven.folder / name, backbone.spec, backbone.weights, allow_pickle=True)


def test_pickles_are_read_only_if_they_may(versus: Made) -> None:
    made = versus("adapterhub", "bert", COVERING)
    pickled = [name for name in made.served if made.oracle.cases[name]["file"] == "bin"]
    assert "prefix_mlp" in pickled
    for name in pickled:
        with pytest.raises(DeltaserveError, match="--allow-pickle-archives"):
            made.driven.lower(name)


def test_made_for_another_backbone(versus: Made) -> None:
    made = versus("adapterhub", "bert", COVERING)
    backbone = versus("adapterhub", "gpt2", COVERING).driven.backbone
    for name in ("seq_bn", "lora_all", "prefix_mlp", "fusion_dynamic"):
        with pytest.raises(BadCheckpoint):
            read(made.driven.folder / name, backbone.spec, backbone.weights, allow_pickle=True)
