"""`python -m deltaserve.demo.train`: makes the embedded default and its deltas again, from nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deltaserve.demo import combining, learning
from deltaserve.demo.results import Results
from deltaserve.demo.tasks import RECIPES
from deltaserve.demo.training import Budget, Course

ASSETS = Path(__file__).parent / "assets"


def train(
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints; a run that was cut goes on from them.",
            show_default="~/.cache/deltaserve/demo-train",
        ),
    ] = None,
    assets: Annotated[
        Path, typer.Option(help="Folder that the result is written to.", show_default="the package's")
    ] = ASSETS,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of every sentence drawn.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of pre-training, of 64 examples.")
    ] = Budget.pretraining_steps,
    tuning_share: Annotated[
        float, typer.Option(min=0.001, help="What the recipes' tuning steps are multiplied by.")
    ] = Budget.tuning_share,
    held_out: Annotated[
        int, typer.Option(min=1, help="Held-out sentences that each exact match is measured on.")
    ] = Budget.held_out,
    full: Annotated[bool, typer.Option(help="Also fine-tune a full copy on each delta's task, for comparison.")] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Tune this delta alone and write no assets; repeatable. For several processes side by side."),
    ] = None,
    add: Annotated[
        bool, typer.Option("--add", help="With --only: tune on the assets' own backbone, and add to the assets.")
    ] = False,
) -> None:
    """Train the demo's backbone, tune its deltas, most of them with PEFT, and write them as the package's assets.

    The backbone learns thirteen functions of sentences, announced by an instruction; then it is frozen, and each delta
    learns one task without an instruction. About 40 minutes on two cores. Needs the extra `dev` (peft).
    """
    unknown = set(only or ()) - {recipe.name for recipe in RECIPES}
    if unknown:
        names = ", ".join(recipe.name for recipe in RECIPES)
        raise typer.BadParameter(f"no delta is called {', '.join(sorted(unknown))}; there are {names}")
    if add and not only:
        raise typer.BadParameter("--add goes with --only")
    torch.set_num_threads(threads)
    folder = work or _cache()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with (
        _told(),
        Progress(
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        ) as progress,
    ):
        course = Course(folder, seed, Budget(steps, tuning_share, held_out), lambda name: _bar(progress, name))
        backbone, trained = (course.shipped(assets), None) if add else course.pretrain()
        chosen = [recipe for recipe in RECIPES if not only or recipe.name in only]
        deltas = [course.tune(recipe, backbone) for recipe in chosen]
        if full:
            pairs = zip(chosen, deltas, strict=True)
            deltas = [replace(delta, full=course.compare(recipe, backbone)) for recipe, delta in pairs]
    if trained is None or not only:
        if trained is None:
            course.add(assets, deltas)
        else:
            course.write(assets, backbone, trained, deltas)
        _show(console, combining.measure(assets))
        console.print(f"Written to {assets}")


@contextmanager
def _told() -> Iterator[None]:
    """What a user can put right is a message, not a traceback."""
    try:
        yield
    except learning.OtherTraining as error:
        raise typer.BadParameter(str(error)) from error


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "deltaserve" / "demo-train"


def _bar(progress: Progress, name: str) -> learning.Report:
    task = progress.add_task(name, total=None, loss="")

    def report(done: int, steps: int, loss: float) -> None:
        progress.update(task, completed=done, total=steps, loss="" if isnan(loss) else f"loss {loss:.4f}")

    return report


def _show(console: Console, results: Results) -> None:
    table = Table(title=f"Exact match on {results.held_out} held-out sentences")
    for column in ("delta", "method", "parameters", "bare backbone", "delta", "full fine-tuning"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for each in results.deltas:
        scores = (each.backbone_exact_match, each.delta.exact_match, each.full and each.full.exact_match)
        shares = ("" if score is None else f"{score:.1%}" for score in scores)
        table.add_row(each.name, each.method, f"{each.delta.parameters:,}", *shares)
    for one in results.combinations:
        table.add_row(" + ".join(one.deltas), "together", "", "", f"{one.exact_match:.1%}", "")
    console.print(table)


if __name__ == "__main__":
    typer.run(train)
