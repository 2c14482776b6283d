"""What is shipped: complete, small, without a trace of where it was made, and as good as results.json says."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open

from deltaserve.demo import batches, language, learning, tokenizer
from deltaserve.demo.batches import Example
from deltaserve.demo.functions import FUNCTIONS, instruction
from deltaserve.demo.results import DeltaOutcome, Results
from deltaserve.demo.show import ASSETS
from deltaserve.demo.tasks import BACKBONE, RECIPES

LIMIT = 16 << 20
ENOUGH = 0.95
FILES = {"adapter_config.json", "adapter_model.safetensors"}
PEFT_TYPES = {"lora": "LORA", "ia3": "IA3", "prefix-tuning": "PREFIX_TUNING", "prompt-tuning": "PROMPT_TUNING"}
RESULTS = Results.read(ASSETS)
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


def test_nine_deltas_of_four_kinds_and_no_others() -> None:
    assert len(RESULTS.deltas) >= 9
    assert {delta.method for delta in RESULTS.deltas} == set(PEFT_TYPES)
    assert {folder.name for folder in (ASSETS / "deltas").iterdir()} == {delta.name for delta in RESULTS.deltas}
    assert {file.name for file in ASSETS.iterdir()} == {"backbone", "deltas", "results.json"}


@each_delta
def test_delta_is_what_its_recipe_says(delta: DeltaOutcome) -> None:
    folder = ASSETS / "deltas" / delta.name
    assert {file.name for file in folder.iterdir()} == FILES
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["peft_type"] == PEFT_TYPES[delta.method]
    assert told["base_model_name_or_path"] == BACKBONE
    recipe = next(recipe for recipe in RECIPES if recipe.name == delta.name)
    assert (recipe.chain, recipe.method, recipe.rate) == (delta.chain, delta.method, delta.rate)
    assert (recipe.steps, dict(recipe.options)) == (delta.delta.steps, delta.options)
    assert delta.full is None or delta.full.steps == delta.delta.steps
    # Prompt-tuning of T5 saves rows for a decoder's prompt too, and trains none of them.
    assert parameters(folder / "adapter_model.safetensors") == delta.delta.parameters


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
def test_peft_answers_them_right(delta: DeltaOutcome) -> None:
    """The files alone, read by PEFT on the shipped backbone: right as often as results.json says."""
    from peft import PeftModel
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(1)
    backbone = T5ForConditionalGeneration.from_pretrained(ASSETS / "backbone").eval()
    model = PeftModel.from_pretrained(backbone, ASSETS / "deltas" / delta.name).eval()
    shown = [Example(tuple(text.split()), tuple(answer.split())) for text, answer in delta.examples]
    assert all(learning.marks(model, shown))
    random = Random(11)
    fresh = [batches.example(random, delta.chain, held=True) for _ in range(60)]
    assert learning.exact_match(model, fresh) >= delta.delta.exact_match - 0.08
