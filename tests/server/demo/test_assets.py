"""What is shipped: complete, small, without a trace of where it was made, and as good as results.json says."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deltaserve.demo import adapters, batches, biases, language, learning, tokenizer
from deltaserve.demo.adapters import SHAPES, VERSION
from deltaserve.demo.batches import Example
from deltaserve.demo.functions import FUNCTIONS, instruction
from deltaserve.demo.results import CombinationOutcome, DeltaOutcome, Results
from deltaserve.demo.show import ASSETS
from deltaserve.demo.tasks import BACKBONE, COMBINATIONS, RECIPES

LIMIT = 16 << 20
ENOUGH = 0.95
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}
FILES = {method: {"adapter_config.json", "adapter.safetensors"} for method in SHAPES}
FILES |= {"bitfit": {"delta.json", "delta.safetensors"}}
"""Of what PEFT does not write."""
PEFT_TYPES = {"lora": "LORA", "ia3": "IA3", "prefix-tuning": "PREFIX_TUNING", "prompt-tuning": "PROMPT_TUNING"}
RESULTS = Results.read(ASSETS)
COMBINED = pytest.mark.parametrize("one", RESULTS.combinations, ids=lambda one: "+".join(one.deltas))
each_delta = pytest.mark.parametrize("delta", RESULTS.deltas, ids=lambda delta: delta.name)


def parameters(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


def test_is_small() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= LIMIT


def test_backbone_is_whole() -> None:
    names = {file.name for file in (ASSETS / "backbone").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert parameters(ASSETS / "backbone" / "model.safetensors") == RESULTS.backbone.parameters


def test_tokenizer_is_that_of_the_code() -> None:
    told = json.loads((ASSETS / "backbone" / "tokenizer.json").read_text())
    assert told["model"]["vocab"] == tokenizer.ids()
    assert json.loads((ASSETS / "backbone" / "config.json").read_text())["vocab_size"] == len(tokenizer.ids())


def test_deltas_of_every_method_and_no_others() -> None:
    assert len(RESULTS.deltas) >= 18
    assert {delta.method for delta in RESULTS.deltas} == {*PEFT_TYPES, *FILES}
    assert {folder.name for folder in (ASSETS / "deltas").iterdir()} == {delta.name for delta in RESULTS.deltas}
    assert {file.name for file in ASSETS.iterdir()} == {"backbone", "deltas", "results.json"}


@each_delta
def test_delta_is_what_its_recipe_says(delta: DeltaOutcome) -> None:
    folder = ASSETS / "deltas" / delta.name
    names = FILES.get(delta.method, PEFT_FILES)
    assert {file.name for file in folder.iterdir()} == names
    config, weights = sorted(names)[::-1] if delta.method in SHAPES else sorted(names)
    told = json.loads((folder / config).read_text())
    if delta.method in PEFT_TYPES:
        assert told["peft_type"] == PEFT_TYPES[delta.method]
        assert told["base_model_name_or_path"] == BACKBONE
    elif delta.method in SHAPES:
        assert (told["name"], told["version"], told["model_class"]) == (
            delta.name,
            VERSION,
            "T5ForConditionalGeneration",
        )
        assert SHAPES[delta.method].told.items() <= told["config"].items()
    recipe = next(recipe for recipe in RECIPES if recipe.name == delta.name)
    assert (recipe.chain, recipe.method, recipe.rate) == (delta.chain, delta.method, delta.rate)
    assert (recipe.steps, dict(recipe.options)) == (delta.delta.steps, delta.options)
    assert delta.full is None or delta.full.steps == delta.delta.steps
    # Prompt-tuning of T5 saves rows for a decoder's prompt too, and trains none of them.
    assert parameters(folder / weights) == delta.delta.parameters


@each_delta
def test_delta_is_good_and_the_bare_backbone_is_not(delta: DeltaOutcome) -> None:
    if delta.delta.exact_match < ENOUGH:
        assert delta.full is not None and delta.delta.exact_match >= delta.full.exact_match - 0.02
    assert delta.backbone_exact_match < 0.5


def test_backbone_knows_its_functions() -> None:
    assert set(RESULTS.backbone.functions) == set(FUNCTIONS)
    assert min(RESULTS.backbone.functions.values()) >= 0.9


def test_no_trace_of_a_machine() -> None:
    trace = re.compile(rb"/(home|root|tmp|work|Users|mnt|var)/|\.cache|site-packages|[A-Z]:\\\\")
    for file in ASSETS.rglob("*"):
        if file.is_file():
            head = file.read_bytes() if file.suffix == ".json" else file.read_bytes()[:20_000]
            assert not trace.search(head), file


def test_examples_are_held_out_and_differ() -> None:
    inputs = [text for delta in RESULTS.deltas for text, _ in delta.examples]
    assert all(language.held_out(text) for text in inputs)
    for text, _ in RESULTS.backbone.examples:
        word, _, sentence = text.partition(" ")
        assert word in {instruction(name) for name in FUNCTIONS} and language.held_out(sentence)
    assert all(len(delta.examples) == 3 for delta in RESULTS.deltas)


@each_delta
def test_expected_answers_are_the_functions(delta: DeltaOutcome) -> None:
    """The examples stand in the stream of held-out sentences, with what the chain makes of them."""
    random = Random(7_000_000)
    stream = [batches.example(random, delta.chain, held=True) for _ in range(RESULTS.held_out)]
    right = {" ".join(each.source): " ".join(each.target) for each in stream}
    assert all(right[text] == answer for text, answer in delta.examples)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # transformers', about PEFT
@each_delta
def test_the_library_answers_them_right(delta: DeltaOutcome) -> None:
    """The files alone, by PEFT or by the modules that were trained, on the shipped backbone: as results.json says."""
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(1)
    backbone = T5ForConditionalGeneration.from_pretrained(ASSETS / "backbone").eval()
    folder = ASSETS / "deltas" / delta.name
    if delta.method in PEFT_TYPES:
        model = PeftModel.from_pretrained(backbone, folder).eval()
    else:
        recipe = next(recipe for recipe in RECIPES if recipe.name == delta.name)
        model = (adapters if delta.method in SHAPES else biases).attach(recipe, backbone)
        if delta.method in SHAPES:
            found = load_file(folder / "adapter.safetensors")
        else:
            made = json.loads((folder / "delta.json").read_text())["at"]
            tensors = load_file(folder / "delta.safetensors")
            found = {f"{site}.bias": tensors[parts[0]["shift"]] for site, parts in made.items()}
        assert found and not model.load_state_dict(found, strict=False).unexpected_keys
    shown = [Example(tuple(text.split()), tuple(answer.split())) for text, answer in delta.examples]
    assert all(learning.marks(model, shown))
    random = Random(11)
    fresh = [batches.example(random, delta.chain, held=True) for _ in range(60)]
    assert learning.exact_match(model, fresh) >= delta.delta.exact_match - 0.08


@COMBINED
def test_a_combination_does_what_none_of_its_members_does(one: CombinationOutcome) -> None:
    assert (one.deltas, one.chain) in [(each.deltas, each.chain) for each in COMBINATIONS]
    assert one.exact_match >= 0.85 and len(one.examples) == 3
    chains = {delta.name: delta.chain for delta in RESULTS.deltas}
    assert all(set(chains[name]) < set(one.chain) for name in one.deltas)
    assert set(one.chain) == {word for name in one.deltas for word in chains[name]}
    for chain in [one.chain, *(tuple(w for w in one.chain if w != word) for word in one.chain)]:
        random = Random(7_000_000)
        stream = [batches.example(random, chain, held=True) for _ in range(RESULTS.held_out)]
        said = {" ".join(each.source): " ".join(each.target) for each in stream}
        assert all((said[text] == answer) is (chain == one.chain) for text, answer in one.examples)


def test_all_combinations_were_measured() -> None:
    assert [one.deltas for one in RESULTS.combinations] == [each.deltas for each in COMBINATIONS]
