"""Every type of PEFT that is served: what it needs of a checkpoint is checked, and the backbone is only read."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tuners import MADE, tuner

from deltaserve.backbone.model import Backbone
from deltaserve.deltas.sites import SiteType
from deltaserve.errors import BadCheckpoint, DeltaserveError, FailedPrecondition, InvalidArgument
from deltaserve.formats.peft.types import TYPES
from deltaserve.formats.registry import read
from deltaserve.formats.wanted import NOTHING_WANTED, Wanted
from deltaserve_kernels.testing import error_ratio

SPARED = {"RANDLORA": ("query.randlora_A", "query.randlora_B", "dense.randlora_A", "dense.randlora_B")}
"""Tensors that may be missing: copies of others."""
SPARED["TINYLORA"] = ("tinylora_P",)
"""PEFT draws it again."""


def family(kind: str) -> str:
    return "gpt2" if kind == "CPT" else "bert"


@pytest.fixture
def made(written: Any, backbones: Mapping[str, Backbone]) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """`made("LORA")` is a checkpoint, and a function that lowers it; no weight of the backbone changes by it."""
    before = {name: _fingerprint(backbone) for name, backbone in backbones.items()}

    def do(kind: str) -> tuple[Any, Any]:
        config = MADE[kind]()
        config.task_type = "CAUSAL_LM" if kind == "CPT" else "FEATURE_EXTRACTION"
        spoilt, backbone = written(family(kind), config), backbones[family(kind)]
        return spoilt, lambda wanted=NOTHING_WANTED: read(spoilt.folder, backbone.spec, backbone.weights, wanted)

    yield do
    assert {name: _fingerprint(backbone) for name, backbone in backbones.items()} == before


def _fingerprint(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, site in backbone.spec.sites.items():
        if site.type is not SiteType.ATTENTION:
            digest.update(backbone.weights(name).numpy().tobytes())
    return digest.hexdigest()


def _parts(folder: Any) -> dict[str, str]:
    """One tensor of each part that the type saves: the name's last words, without those of the module."""
    found: dict[str, str] = {}
    for name in load_file(folder / "adapter_model.safetensors"):
        found.setdefault(".".join(word for word in name.split(".")[-4:] if not word.isdigit()), name)
    return found


def test_table_is_whole() -> None:
    assert set(MADE) == set(TYPES)


@pytest.mark.parametrize("kind", MADE)
def test_each_tensor_is_needed(kind: str, made: Any) -> None:
    spoilt, reading = made(kind)
    delta = reading()
    assert delta.kinds
    assert delta.provenance.tensors_matched == len(load_file(spoilt.folder / "adapter_model.safetensors"))
    for part, name in _parts(spoilt.folder).items():
        if part.endswith(SPARED.get(kind, "nothing")):
            continue
        held: dict[str, torch.Tensor] = {}
        spoilt.tensors(lambda tensors, name=name, held=held: held.update(tensors) or tensors.pop(name))
        with pytest.raises((BadCheckpoint, FailedPrecondition)) as raised:
            reading()
        assert name.rpartition("base_model.")[2].removeprefix("model.") in str(raised.value) or kind in NAMED, name
        spoilt.tensors(lambda tensors, held=held: tensors.update(held))


NAMED = ("TRAINABLE_TOKENS", "LOKR", "SUPERTUNING", "VBLORA", "LOHA")
"""What is missing decides which of several layouts it is: the message names another tensor of the module."""


@pytest.mark.parametrize("kind", MADE)
def test_each_shape_and_number_is_checked(kind: str, made: Any) -> None:
    spoilt, reading = made(kind)
    for name in _parts(spoilt.folder).values():
        whole = load_file(spoilt.folder / "adapter_model.safetensors")
        for change in (_longer, _flatter, _spoilt):
            changed = change(whole[name])
            if changed is not None:
                spoilt.tensors(lambda tensors, name=name, changed=changed: tensors.update({name: changed}))
                with pytest.raises((BadCheckpoint, FailedPrecondition)):
                    reading()
        spoilt.tensors(lambda tensors, name=name, whole=whole: tensors.update({name: whole[name]}))
    reading()


def _longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor[:1]))


def _flatter(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(0)


def _spoilt(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or a place far outside."""
    changed = tensor.clone()
    changed.flatten()[0] = float("nan") if tensor.dtype.is_floating_point else 1 << 20
    return changed


SIZES = {"LORA": "r", "FOURIERFT": "n_frequency", "WAVEFT": "n_frequency", "C3A": "block_size"}
SIZES |= dict.fromkeys(("UNILORA", "TINYLORA", "POLY", "RANDLORA", "PSOFT", "DEFT", "PEANUT", "GLORA", "HIRA"), "r")
SIZES |= dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "P_TUNING", "CPT"), "num_virtual_tokens")
SIZES |= {"MULTITASK_PROMPT_TUNING": "num_ranks", "ROAD": "group_size", "VBLORA": "num_vectors"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("size", [0, 7, 1 << 13, 1 << 40, "2", None])
def test_size_is_checked_before_anything_is_made(kind: str, size: Any, made: Any) -> None:
    spoilt, reading = made(kind)
    spoilt.config(**{SIZES[kind]: size})
    with pytest.raises(DeltaserveError):
        reading()


OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("RANDLORA", "save_projection", False),
    ("FROD", "save_projection", False),
    ("WAVEFT", "wavelet_family", "coif5"),
    ("WAVEFT", "wavelet_family", ["db1"]),
    ("PEANUT", "act_fn", "xielu"),
    ("PEANUT", "act_fn", ["relu"]),
    ("PVERA", "sample_at_inference", True),
)


@pytest.mark.parametrize(("kind", "key", "value"), OPTIONS)
def test_option_is_refused_by_its_key(kind: str, key: str, value: Any, made: Any) -> None:
    spoilt, reading = made(kind)
    spoilt.config(**{key: value})
    with pytest.raises(FailedPrecondition, match=f"'{key}'") as raised:
        reading()
    assert raised.value.reason == "OPTION_NOT_SERVED"
    assert raised.value.metadata["key"] == key


TASKS = {"POLY": "n_tasks", "MULTITASK_PROMPT_TUNING": "num_tasks"}


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_of_several_must_be_named(kind: str, written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone = backbones["bert"]
    config = MADE[kind]()
    config.task_type = "FEATURE_EXTRACTION"
    setattr(config, TASKS[kind], 3)
    folder = written("bert", config).folder

    def of(task: int | None) -> Any:
        return read(folder, backbone.spec, backbone.weights, Wanted(task_id=task))

    for task in (None, 3, 1 << 31):
        with pytest.raises(InvalidArgument, match=r"3 tasks.*from 0 to 2") as raised:
            of(task)
        assert (raised.value.field, raised.value.reason) == ("task_id", "BAD_TASK_ID")
    deltas = [of(task) for task in range(3)]
    assert [delta.task_id for delta in deltas] == [0, 1, 2]
    numbers = [torch.cat([tensor.flatten() for tensor in delta.tensors()]) for delta in deltas]
    assert all(error_ratio(one, two) > 1e-2 for one, two in itertools.combinations(numbers, 2))


@pytest.mark.parametrize("kind", TASKS)
def test_the_only_task_need_not_be_named(kind: str, made: Any) -> None:
    _, reading = made(kind)
    assert reading().task_id == reading(Wanted(task_id=0)).task_id == 0
    with pytest.raises(InvalidArgument, match=r"task_id is 1; the checkpoint is for 1 task,.*from 0 to 0"):
        reading(Wanted(task_id=1))


@pytest.mark.parametrize("kind", TASKS)
def test_tasks_are_those_of_the_tensors(kind: str, made: Any) -> None:
    spoilt, reading = made(kind)
    spoilt.config(**{TASKS[kind]: 2})
    with pytest.raises(BadCheckpoint, match="has shape"):
        reading(Wanted(task_id=1))


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in TASKS])
def test_no_task_is_named_where_there_are_none(kind: str, made: Any) -> None:
    _, reading = made(kind)
    with pytest.raises(InvalidArgument, match=f"task_id is 0; .* '{kind}' has no tasks") as raised:
        reading(Wanted(task_id=0))
    assert raised.value.field == "task_id"


def test_a_span_has_a_start_and_an_end(written: Any, backbones: Mapping[str, Backbone]) -> None:
    backbone, config = backbones["bert"], tuner("Lora", r=2)
    config.task_type = "QUESTION_ANS"
    spoilt = written("bert", config, "AutoModelForQuestionAnswering")
    read(spoilt.folder, backbone.spec, backbone.weights)
    spoilt.tensors(lambda t: t.update({n: torch.cat((v, v[:1])) for n, v in t.items() if "qa_outputs" in n}))
    with pytest.raises(BadCheckpoint, match="'qa_outputs' has 3 outputs; for this task it has 2"):
        read(spoilt.folder, backbone.spec, backbone.weights)


VALUES: tuple[tuple[str, str, Any, str], ...] = (
    ("DEFT", "decomposition_method", "svd", "'decomposition_method' is 'svd'"),
    ("PSOFT", "ab_svd_init", "x", "'ab_svd_init' is 'x'"),
    ("PSOFT", "psoft_orth", "yes", "true or false is expected"),
    ("PEANUT", "depth", -1, "'depth' is -1"),
    ("GLORA", "config_A_B", "x", "'config_A_B' is 'x'"),
    ("GLORA", "config_C", "constant", "'config_C' is 'constant'"),
    ("POLY", "n_splits", 3, "'n_splits' is 3, which does not divide"),
    ("POLY", "poly_type", "x", "'poly_type' is 'x'"),
    ("WAVEFT", "random_loc_seed", -1, "'random_loc_seed' is -1"),
    ("UNILORA", "theta_d_length", 41, r"shape \[40\]; .* \[41\]"),
    ("TINYLORA", "projection_seed", 1.5, "'projection_seed' is 1.5"),
    ("TINYLORA", "weight_tying", "x", "'weight_tying' is 'x'"),
    ("SUPERTUNING", "sparsity", 1, "'sparsity' is 1.0"),
    ("SUPERTUNING", "select_top", "yes", "true or false is expected"),
    ("PSOFT", "psoft_svd_lowrank_niter", 0, "'psoft_svd_lowrank_niter' is 0"),
    ("GLORA", "bias", "glora_only", "query.base_layer.bias' is missing"),
    ("GLORA", "bias", "lora_only", "'bias' is 'lora_only'"),
)


@pytest.mark.parametrize(("kind", "key", "value", "said"), VALUES)
def test_value_is_refused(kind: str, key: str, value: Any, said: str, made: Any) -> None:
    spoilt, reading = made(kind)
    spoilt.config(**{key: value})
    with pytest.raises(BadCheckpoint, match=said):
        reading()


def test_unilora_deals_no_more_numbers_than_the_weights_have(made: Any) -> None:
    """Without its indices nothing in the file bounds the rank."""
    spoilt, reading = made("UNILORA")
    spoilt.tensors(lambda tensors: [tensors.pop(name) for name in list(tensors) if "theta" not in name])
    spoilt.config(save_indices=False)
    assert reading().kinds == ("unilora",)
    spoilt.config(r=1 << 14)
    with pytest.raises(BadCheckpoint, match="more numbers than the weights"):
        reading()


def test_frod_of_bases_that_are_none(made: Any) -> None:
    """Bases that W cannot be written in: what is left of it is nothing, and no NaN."""
    spoilt, reading = made("FROD")
    spoilt.tensors(lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "frod_V" in name])
    changes = [part.weight for parts in reading().at.values() for part in parts]
    assert changes and not any(bool(change.any()) for change in changes)


def test_randlora_copies_must_be_copies(made: Any) -> None:
    spoilt, reading = made("RANDLORA")
    name = "base_model.model.encoder.layer.0.attention.self.query.randlora_A"
    spoilt.tensors(lambda tensors: tensors[name].add_(1))
    with pytest.raises(BadCheckpoint, match="is not the randlora_A that all modules share"):
        reading()
