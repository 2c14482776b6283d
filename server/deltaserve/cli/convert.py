"""`deltaserve convert`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deltaserve.cli import options, screen
from deltaserve.cli.extra import needs

if TYPE_CHECKING:
    from deltaserve.app.conversion import Converted

MODEL = "Backbone"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="The folder of a checkpoint, or of a setup of several.", show_default=False
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DESTINATION", help="A folder to be made; the server loads it.", show_default=False),
    ],
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone",
            envvar="DELTASERVE_BACKBONE",
            metavar="BACKBONE",
            help="Folder or Hub id of the model that will serve it.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the Hub.", show_default="main", rich_help_panel=MODEL),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(help="What the server calls the backbone.", show_default="its name", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Of the backbone, as the server has it: what is computed from its weights holds for no others.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    task: options.Task = None,
    labels: options.Labels = None,
    problem_type: options.ProblemType = None,
    task_id: options.TaskId = None,
    allow_pickle_archives: Annotated[
        bool,
        typer.Option(
            "--allow-pickle-archives",
            help="Also read .bin checkpoints (weights only, bounded); AdapterHub's prefixes, OpenDelta's all.",
            show_default=False,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what an earlier conversion wrote there.", show_default=False)
    ] = False,
    json: options.Json = False,
) -> None:
    """Lower a checkpoint ahead of time, so that a server loads it without computing. Needs no server."""
    with needs("server"):
        from deltaserve.app.conversion import Conversion
        from deltaserve.app.conversion import convert as run
        from deltaserve.deltas.sites import Task
        from deltaserve.formats.wanted import Wanted
    job = Conversion(
        source=source,
        destination=destination,
        backbone=backbone,
        wanted=Wanted(None if task is None else Task(task), tuple(labels or ()), problem_type, task_id),
        served_name=served_name,
        revision=revision,
        dtype=dtype,
        allow_pickle=allow_pickle_archives,
        replace=force,
    )
    with _bar() as told:
        made = run(job, told)
    if json:
        screen.as_json(made)
    else:
        _show(made, destination)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """On a terminal: modules done of all, and the time since the beginning."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("loading the backbone", total=None)
        yield lambda done, total: progress.update(bar, description="lowering", completed=done, total=total)


def _show(made: "Converted", destination: Path) -> None:
    card = made.card
    screen.facts(
        (
            ("written", destination),
            ("kinds", ", ".join(card.kinds)),
            ("task", (card.task or "").replace("_", " ")),
            ("labels", ", ".join(card.labels)),
            ("backbone", f"{made.backbone} in {made.dtype}"),
            ("sites", card.sites),
            ("tensors", made.tensors),
            ("parameters", screen.amount(card.parameters)),
            ("before", screen.size(made.before_bytes)),
            ("after", screen.size(made.after_bytes)),
            ("seconds", f"{made.seconds:.2f}"),
            *(("warning", warning) for warning in card.warnings),
        )
    )
