"""The stages of training, each kept in the work folder when it is done, so that a cut run goes on where it was."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from deltaserve.demo import adapters, batches, biases, learning, tokenizer, tuning
from deltaserve.demo.batches import Batch, Example
from deltaserve.demo.functions import FUNCTIONS
from deltaserve.demo.results import BackboneOutcome, DeltaOutcome, Outcome, Results
from deltaserve.demo.tasks import RECIPES, Recipe

PRETRAINING_BATCH, PRETRAINING_RATE = 64, 1e-3
TUNING_BATCH, FULL_RATE = 32, 5e-4
SHOWN_FUNCTIONS = ("reverse", "translate", "plural", "sentiment")
SHOWN_EXAMPLES, SHOWN_WORDS, SHOWN_WIDTH = 3, 5, 36  # the width in characters: a table holds three of them
_TUNERS: Mapping[str, Any] = {**dict.fromkeys(adapters.SHAPES, adapters), "bitfit": biases}
"""What attaches and saves a method; PEFT all others."""
HELD_OUT_SEED = 7_000_000  # far from every training seed, though held-out sentences are others in any case


@dataclass(frozen=True)
class Budget:
    """How much to train. `tuning_share` multiplies the steps that each recipe names."""

    pretraining_steps: int = 6_500
    tuning_share: float = 1.0
    held_out: int = 400


@dataclass(frozen=True)
class Course:
    """One run of the whole training in one work folder."""

    work: Path
    seed: int
    budget: Budget
    progress: Callable[[str], learning.Report]  # a stage's name to what hears of its steps

    def pretrain(self) -> tuple[Any, BackboneOutcome]:
        """The trained backbone in eval mode, and what it knows."""
        torch.manual_seed(self.seed)
        model = learning.backbone()
        seconds = self._learn(
            model,
            partial(batches.pretraining, size=PRETRAINING_BATCH),
            name="backbone",
            steps=self.budget.pretraining_steps,
            rate=PRETRAINING_RATE,
            seed=self.seed + 1,
        )
        return model, BackboneOutcome(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            steps=self.budget.pretraining_steps,
            batch=PRETRAINING_BATCH,
            seconds=round(seconds, 1),
            functions={name: learning.exact_match(model, self._held_out((name,), name)) for name in FUNCTIONS},
            examples=tuple(
                example
                for skip, name in enumerate(SHOWN_FUNCTIONS)
                for example in self._shown(model, self._held_out((name,), name), 1, skip)
            ),
        )

    @staticmethod
    def shipped(assets: Path) -> Any:
        """The backbone of an asset folder, in eval mode."""
        from transformers import T5ForConditionalGeneration

        return T5ForConditionalGeneration.from_pretrained(assets / "backbone").eval()

    def tune(self, recipe: Recipe, backbone: Any) -> DeltaOutcome:
        """Tunes the delta; leaves its files under `deltas/<name>`."""
        examples = self._held_out(recipe.chain)
        torch.manual_seed(self.seed + 2)
        by = _TUNERS.get(recipe.method, tuning)
        tuned = by.attach(recipe, backbone)
        outcome = self._outcome(recipe, tuned, recipe.name, recipe.rate, examples)
        by.save(recipe, tuned, self.work / "deltas" / recipe.name)
        return DeltaOutcome(
            name=recipe.name,
            chain=recipe.chain,
            method=recipe.method,
            rate=recipe.rate,
            options=dict(recipe.options),
            delta=outcome,
            full=None,
            backbone_exact_match=learning.exact_match(backbone, examples),
            examples=self._shown(tuned, examples, SHOWN_EXAMPLES, skip=SHOWN_EXAMPLES * RECIPES.index(recipe)),
        )

    def compare(self, recipe: Recipe, backbone: Any) -> Outcome:
        """Full fine-tuning of a copy, on the same batches."""
        examples = self._held_out(recipe.chain)
        return self._outcome(recipe, copy.deepcopy(backbone), f"{recipe.name}.full", FULL_RATE, examples)

    def write(self, assets: Path, backbone: Any, trained: BackboneOutcome, deltas: list[DeltaOutcome]) -> Results:
        """Replaces the asset folder's contents by this run's."""
        shutil.rmtree(assets, ignore_errors=True)
        backbone.save_pretrained(assets / "backbone")
        tokenizer.build().save_pretrained(assets / "backbone")
        for outcome in deltas:
            shutil.copytree(self.work / "deltas" / outcome.name, assets / "deltas" / outcome.name)
        for file in assets.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them for their owner alone
        results = Results(
            seed=self.seed,
            date=datetime.now(UTC).date().isoformat(),
            versions={name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
            threads=torch.get_num_threads(),
            held_out=self.budget.held_out,
            tuning_batch=TUNING_BATCH,
            full_rate=FULL_RATE,
            backbone=trained,
            deltas=tuple(deltas),
        )
        results.write(assets)
        return results

    def add(self, assets: Path, deltas: list[DeltaOutcome]) -> Results:
        """Puts these deltas among those of an asset folder whose backbone they were tuned on."""
        before = Results.read(assets)
        for outcome in deltas:
            shutil.copytree(self.work / "deltas" / outcome.name, assets / "deltas" / outcome.name, dirs_exist_ok=True)
            for file in (assets / "deltas" / outcome.name).glob("*.safetensors"):
                file.chmod(0o644)
        names = [recipe.name for recipe in RECIPES]
        known = {delta.name: delta for delta in (*before.deltas, *deltas)}
        results = replace(before, deltas=tuple(sorted(known.values(), key=lambda delta: names.index(delta.name))))
        results.write(assets)
        return results

    def _outcome(self, recipe: Recipe, model: Any, name: str, rate: float, examples: list[Example]) -> Outcome:
        steps = max(1, round(recipe.steps * self.budget.tuning_share))
        seconds = self._learn(
            model,
            partial(batches.tuning, chain=recipe.chain, size=TUNING_BATCH),
            name=name,
            steps=steps,
            rate=rate,
            seed=self.seed + 3 + RECIPES.index(recipe),
        )
        parameters = sum(parameter.numel() for parameter in learning.trainable(model))
        return Outcome(parameters, steps, round(seconds, 1), learning.exact_match(model, examples))

    def _learn(
        self, model: Any, stream: Callable[[Random], Iterator[Batch]], name: str, steps: int, rate: float, seed: int
    ) -> float:
        return learning.learn(
            model,
            stream,
            steps=steps,
            rate=rate,
            seed=seed,
            checkpoint=self.work / f"{name}.pt",
            report=self.progress(name),
        )

    def _shown(self, model: Any, examples: list[Example], count: int, skip: int) -> tuple[tuple[str, str], ...]:
        """Some of the examples that the model answers right: short enough for a table, and with something to do.

        `skip` lets each delta show other sentences.
        """
        worth = [each for each in examples if telling(each)]
        marks = learning.marks(model, worth) if worth else []
        right = [each for each, mark in zip(worth, marks, strict=True) if mark]
        chosen = islice(cycle(right), skip, skip + min(count, len(right)))
        return tuple((" ".join(each.source), " ".join(each.target)) for each in chosen)

    def _held_out(self, chain: tuple[str, ...], instructed: str | None = None) -> list[Example]:
        random = Random(HELD_OUT_SEED)
        if instructed is not None:
            return [batches.instructed(random, instructed, held=True) for _ in range(self.budget.held_out)]
        return [batches.example(random, chain, held=True) for _ in range(self.budget.held_out)]


def telling(each: Example) -> bool:
    """Whether it is short enough for a table, and something is done to it."""
    longest = max(len(" ".join(words)) for words in (each.source, each.target))
    unchanged = each.target in (each.source, each.source[1:])  # without or with an instruction
    return len(each.source) >= SHOWN_WORDS and longest <= SHOWN_WIDTH and not unchanged
