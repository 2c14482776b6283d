"""What is wrong with a checkpoint of AdapterHub's is said by name, and nothing is loaded in part."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import (
    COMPACTER,
    HIDDEN,
    PAR,
    PREFIX,
    PROMPT,
    REFT,
    SEQ,
    Draw,
    Made,
    Reading,
    Tensors,
    bottlenecks,
    loaded,
    save,
)
from test_adapterhub_others import edits

from deltaserve.backbone.model import Backbone
from deltaserve.errors import BadCheckpoint, DeltaserveError, FailedPrecondition
from deltaserve.formats.registry import content_hash

AT = "encoder.layer.0.output.adapters.a"


@pytest.fixture
def reading(backbones: Mapping[str, Backbone], tmp_path: Path) -> Reading:
    return Reading(backbones, tmp_path)


SPOILS: Mapping[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(f"{AT}.adapter_up.weight"), "adapter_up.weight' is missing"),
    "no tensors": (lambda t: t.clear(), "is missing"),
    "a layer without": (lambda t: [t.pop(n) for n in list(t) if "layer.1" in n], "layer.1.output.adapters.a"),
    "extra": (lambda t: t.update({f"{AT}.adapter_norm_after.weight": torch.ones(HIDDEN)}), "no place in"),
    "another layer": (lambda t: t.update({"encoder.layer.7.output.adapters.a.x": torch.ones(1)}), "layer.7"),
    "another adapter": (lambda t: t.update({"encoder.layer.0.output.adapters.b.x": torch.ones(1)}), "adapters.b"),
    "a weight of the backbone": (lambda t: t.update({"pooler.dense.weight": torch.ones(16, 16)}), "pooler.dense"),
    "other width": (lambda t: t.update({f"{AT}.adapter_down.0.weight": torch.ones(5, 16)}), "[5, 16]"),
    "other backbone": (lambda t: t.update({f"{AT}.adapter_down.0.weight": torch.ones(4, 24)}), "[4, 24]"),
    "one dimension": (lambda t: t.update({f"{AT}.adapter_up.weight": torch.ones(64)}), "[64]"),
    "NaN": (lambda t: t[f"{AT}.adapter_up.bias"].fill_(float("nan")), "NaN or infinite"),
    "infinite": (lambda t: t[f"{AT}.adapter_up.bias"].fill_(float("inf")), "NaN or infinite"),
    "whole numbers": (lambda t: t.update({f"{AT}.adapter_up.bias": torch.ones(16, dtype=torch.int64)}), "float type"),
    "the same twice": (
        lambda t: t.update({f"bert.{AT}.adapter_up.bias": torch.ones(16)}),
        "are for one and the same place",
    ),
}


@pytest.mark.parametrize("what", SPOILS)
def test_tensors(what: str, reading: Reading, tmp_path: Path) -> None:
    change, said = SPOILS[what]
    tensors = bottlenecks(SEQ)
    change(tensors)
    made = Made(SEQ, tensors)
    if what == "the same twice":
        folder = made.write(tmp_path / "twice")
        save({**loaded(folder), f"{AT}.adapter_up.bias": torch.ones(16)}, folder, "adapter.safetensors", "")
        reading.refused(folder, said)
    else:
        reading.refused(made, said)


VALUES: tuple[tuple[str, Any, str, type[Exception]], ...] = (
    ("reduction_factor", 0, "no width", BadCheckpoint),
    ("reduction_factor", -4, "no width", BadCheckpoint),
    ("reduction_factor", 1e-300, "no width", BadCheckpoint),
    ("reduction_factor", 1e-4, "shape", BadCheckpoint),
    ("reduction_factor", 10**400, "a number is expected", BadCheckpoint),
    ("reduction_factor", float("nan"), "a number is expected", BadCheckpoint),
    ("reduction_factor", "16", "a number is expected", BadCheckpoint),
    ("reduction_factor", {"7": 4}, "a number is expected", BadCheckpoint),
    ("non_linearity", "glow", "'non_linearity' is 'glow'", FailedPrecondition),
    ("non_linearity", 5, "'non_linearity' is 5", BadCheckpoint),
    ("scaling", 4, "'scaling' is 4; a float", BadCheckpoint),
    ("scaling", "much", "'scaling' is 'much'", BadCheckpoint),
    ("scaling", float("inf"), "a number is expected", BadCheckpoint),
    ("mh_adapter", "yes", "true or false", BadCheckpoint),
    ("output_adapter", False, "at no sublayer", BadCheckpoint),
    ("residual_before_ln", "post", "'post_add' is expected", BadCheckpoint),
    ("leave_out", {"0": 1}, "'leave_out'", BadCheckpoint),
    ("inv_adapter", "glow", "the library itself raises", FailedPrecondition),
    ("inv_adapter", "nice", "'inv_adapter_reduction_factor' is None", BadCheckpoint),
    ("inv_adapter", "other", "'nice' is expected", BadCheckpoint),
    ("invertible_adapter", 3, "an object is expected", BadCheckpoint),
    ("architecture", "unheard_of", "this release serves null, prefix_tuning, lora", FailedPrecondition),
    ("architecture", ["lora"], "this release serves", FailedPrecondition),
    ("an_option_of_tomorrow", "on", "'an_option_of_tomorrow' is 'on'", FailedPrecondition),
    ("phm_layer", True, "has no 'shared_parameters.a'", FailedPrecondition),
    ("ln_before", True, "adapter_down.0", BadCheckpoint),
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("key", "value", "said", "error"), VALUES, ids=[f"{k}={v}"[:40] for k, v, *_ in VALUES])
def test_values(key: str, value: Any, said: str, error: Any, reading: Reading) -> None:
    reading.refused(Made({**SEQ, key: value}, bottlenecks(SEQ)), said, error=error)


KNOWN: tuple[tuple[dict[str, Any], str, type[Exception]], ...] = (
    ({"config": None}, "an object or the name of one", BadCheckpoint),
    ({"config": "unheard_of"}, "the name 'unheard_of'", FailedPrecondition),
    ({"config": "pfeiffer[reduction_factor=8]"}, "write the whole config", FailedPrecondition),
    ({"config": "../../etc/passwd"}, "the name '../../etc/passwd'", FailedPrecondition),
    ({"config": {"architecture": "union"}}, "'configs' is None", BadCheckpoint),
    ({"config": {"architecture": "union", "configs": [{"architecture": "union"}]}}, "no unions", BadCheckpoint),
    ({"config": {"architecture": "union", "configs": ["pfeiffer"]}}, "objects that are no unions", BadCheckpoint),
    ({"config": {"architecture": "union", "configs": [SEQ] * 100}}, "a list of 1 to 16", BadCheckpoint),
    ({"config": {"architecture": "union", "configs": [SEQ, PAR]}}, "two parts of the config", BadCheckpoint),
    ({"config": ...}, "none of peft_type, config", BadCheckpoint),
    ({"name": None}, "'name' is None", BadCheckpoint),
    ({"name": ""}, "'name' is ''", BadCheckpoint),
    ({"name": "x" * 5000}, "1 to 200 characters", BadCheckpoint),
    ({"name": "b"}, "adapters.b.adapter_down.0.weight' is missing", BadCheckpoint),
    ({"model_type": "gpt2"}, "another kind of backbone than this bert", BadCheckpoint),
    ({"hidden_size": 768}, "'hidden_size' is 768; this backbone has 16", BadCheckpoint),
)


@pytest.mark.parametrize(("known", "said", "error"), KNOWN, ids=[str(known)[:50] for known, *_ in KNOWN])
def test_what_stands_beside_the_config(known: Any, said: str, error: Any, reading: Reading) -> None:
    reading.refused(Made(SEQ, bottlenecks(SEQ), known=known), said, error=error)


def test_another_backbone_of_the_same_kind_is_a_warning(reading: Reading) -> None:
    delta = reading(Made(SEQ, bottlenecks(SEQ), known={"model_name": "somebody/bert-base"}))
    assert any("somebody/bert-base" in text for text in delta.provenance.warnings)
    assert delta.provenance.base_model == "somebody/bert-base"


METHODS: tuple[tuple[str, Any, Mapping[str, Any], str, type[Exception]], ...] = (
    ("gpt2", PROMPT, {}, "does not have this method there", FailedPrecondition),
    ("t5", REFT, {}, "positions of the encoder's text", FailedPrecondition),
    ("gemma2", PREFIX, {}, "does not have this method there", FailedPrecondition),
    ("gpt2", REFT, {"suffix_positions": 1}, "no cache of keys and values", FailedPrecondition),
    ("gpt2", SEQ, {"use_gating": True}, "gates are served on encoders", FailedPrecondition),
    ("gpt2", PREFIX, {"use_gating": True}, "gates are served on encoders", FailedPrecondition),
    ("t5", SEQ, {"residual_before_ln": "post_add"}, "no norm stands behind", FailedPrecondition),
    ("gemma2", SEQ, {"original_ln_after": False}, "cannot take the model's own residual", FailedPrecondition),
    ("modernbert", SEQ, {}, "no stream of this model", FailedPrecondition),
    ("bert", REFT, {"prefix_positions": 0}, "it edits nothing", BadCheckpoint),
    ("bert", REFT, {"prefix_positions": 1 << 40}, "'prefix_positions' is", BadCheckpoint),
    ("bert", REFT, {"layers": [9]}, "this backbone has 2 layers", BadCheckpoint),
    ("bert", REFT, {"r": 1 << 40}, "'r' is", BadCheckpoint),
    ("bert", REFT, {"r": 17, "orthogonality": True}, "at most as many rows", BadCheckpoint),
    ("bert", REFT, {"orthogonality": None}, "projection.weight' is missing", BadCheckpoint),
    ("bert", PREFIX, {"prefix_length": 1 << 40}, "'prefix_length' is", BadCheckpoint),
    ("bert", PREFIX, {"prefix_length": 0}, "'prefix_length' is 0", BadCheckpoint),
    ("bert", PREFIX, {"prefix_length": 4000}, "is missing", BadCheckpoint),
    ("bert", {**PREFIX, "flat": False}, {"bottleneck_size": 1 << 40}, "'bottleneck_size' is", BadCheckpoint),
    ("bert", PROMPT, {"prompt_length": 4000}, "this backbone has 32 positions", BadCheckpoint),
    ("bert", PROMPT, {"combine": "suffix"}, "'combine' is 'suffix'", BadCheckpoint),
    ("bert", COMPACTER, {"phm_dim": 3}, "'phm_dim' is 3", BadCheckpoint),
    ("bert", COMPACTER, {"reduction_factor": 0.01}, "expanded are 8 times", BadCheckpoint),
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("family", "told", "changes", "said", "error"), METHODS)
def test_methods(family: str, told: Any, changes: Any, said: str, error: Any, reading: Reading) -> None:
    rows = {"prompt_tuning.prompt_tunings.a.prompt_embedding.weight": torch.ones(3, HIDDEN)} if told is PROMPT else {}
    for i, layer in enumerate(("encoder.layer.0", "encoder.layer.1")) if told is REFT else ():
        for unit in range(2):
            at = f"{layer}.reft_layer.refts.a.units.{unit}"
            rows |= Draw(i).linear(
                f"{at}.learned_source", HIDDEN, changes.get("r", 2) if changes.get("r", 2) < 99 else 2
            )
    reading.refused(Made({**told, **changes}, rows, family), said, error=error)


def test_activation_that_cannot_pass_a_number_unchanged(reading: Reading) -> None:
    told = {**REFT, "non_linearity": "tanh"}
    reading.refused(Made(told, edits(REFT)), "'non_linearity' is 'tanh'", error=FailedPrecondition)


def test_two_copies_of_one_norm_that_differ(reading: Reading) -> None:
    told = {**SEQ, "ln_before": True}
    tensors = bottlenecks(told)
    tensors[f"{AT}.adapter_norm_before.weight"] += 1
    reading.refused(Made(told, tensors), "are one norm, and differ")


def test_numbers_that_come_to_none(reading: Reading) -> None:
    told = {**SEQ, "scaling": 1e38}
    tensors = bottlenecks(told)
    tensors[f"{AT}.adapter_up.weight"].fill_(1e30)
    reading.refused(Made(told, tensors), "in float32")


def test_a_fresh_start_is_said(reading: Reading) -> None:
    tensors = bottlenecks(SEQ)
    for name in tensors:
        if "adapter_up" in name:
            tensors[name].zero_()
    assert any("changes nothing" in text for text in reading(Made(SEQ, tensors)).provenance.warnings)


ARCHIVES: tuple[tuple[Any, Tensors, str], ...] = (
    (PREFIX, {}, "a prefix in no other way"),
    ("prefix_tuning_flat", {}, "a prefix in no other way"),
    ({"architecture": "union", "configs": [PREFIX, SEQ]}, {}, "a prefix in no other way"),
    ({**SEQ, "ln_before": True}, {}, "ln_before in no other way"),
    (SEQ, {}, "save it with use_safetensors=True"),
)


@pytest.mark.parametrize(("told", "tensors", "said"), ARCHIVES)
def test_archives_are_for_the_operator_to_allow(told: Any, tensors: Tensors, said: str, reading: Reading) -> None:
    made = Made(told, tensors, pickled=True)
    caught = reading.refused(made, said, "--allow-pickle-archives", error=FailedPrecondition, allow_pickle=False)
    assert caught.reason == "PICKLE_NOT_ALLOWED"


def test_archive_is_read_where_it_is_allowed(reading: Reading) -> None:
    tensors = bottlenecks(SEQ)
    assert len(reading(Made(SEQ, tensors, pickled=True)).at) == len(reading(Made(SEQ, tensors)).at) == 2


class Nasty:
    def __reduce__(self) -> Any:
        return (print, ("it was run",))


def test_archive_of_anything_else(reading: Reading, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Made(SEQ, {}, pickled=True).write(tmp_path / "one")
    for content in ({"x": Nasty()}, [torch.ones(1)], {"x": 3}, {3: torch.ones(1)}):
        torch.save(content, folder / "pytorch_adapter.bin")
        reading.refused(folder, "pytorch_adapter.bin")
    assert "it was run" not in capsys.readouterr().out


def test_archive_whose_tensors_claim_more_than_it_has(reading: Reading, tmp_path: Path) -> None:
    folder = Made(SEQ, {}, pickled=True).write(tmp_path / "one")
    torch.save({"x": torch.ones(1).expand(1 << 30)}, folder / "pytorch_adapter.bin")
    reading.refused(folder, "more than the file holds")


def test_truncated_files(reading: Reading, tmp_path: Path) -> None:
    for number, pickled in enumerate((False, True)):
        folder = Made(SEQ, bottlenecks(SEQ), pickled=pickled).write(tmp_path / str(number))
        file = folder / ("pytorch_adapter.bin" if pickled else "adapter.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        reading.refused(folder, file.name)
    (folder / "adapter_config.json").write_text('{"name": ')
    reading.refused(folder, "is not JSON")


def test_files_that_are_missing(reading: Reading, tmp_path: Path) -> None:
    folder = Made(SEQ, bottlenecks(SEQ)).write(tmp_path / "one")
    (folder / "adapter.safetensors").unlink()
    reading.refused(folder, "holds no adapter.safetensors")
    reading.refused(tmp_path / "nowhere", "is not a folder")


def test_library_is_known_by_content(reading: Reading, tmp_path: Path) -> None:
    """PEFT calls its config so too."""
    folder = Made(SEQ, bottlenecks(SEQ)).write(tmp_path / "one")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    reading.refused(folder, "adapter_model.safetensors", error=DeltaserveError)


def test_content_counts_the_head(tmp_path: Path) -> None:
    folder = Made(SEQ, bottlenecks(SEQ)).write(tmp_path / "one")
    before = content_hash(folder)
    (folder / "head_config.json").write_text("{}")
    assert content_hash(folder) != before
