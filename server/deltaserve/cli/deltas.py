"""`deltaserve deltas`: load, ls, show, unload."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.cli import options, screen

if TYPE_CHECKING:
    from deltaserve_client import DeltaInfo

app = typer.Typer(help="Load, list and unload deltas while a server runs.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="\\[tenant/]name of the delta.", show_default=False)]
Reference = Annotated[str, typer.Argument(metavar="NAME", help="name or name@version.", show_default=False)]


@app.command()
def load(
    context: typer.Context,
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="The folder of a checkpoint, or of a setup of several, relative to the server's --delta-root.",
        ),
    ],
    replace: Annotated[
        bool | None,
        typer.Option("--replace", help="Allow another content: it becomes the next version.", show_default=False),
    ] = None,
    task: options.Task = None,
    labels: options.Labels = None,
    problem_type: options.ProblemType = None,
    task_id: options.TaskId = None,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Load a checkpoint; returns when it is resident or refused."""  # fmt: skip
    from deltaserve_client.options import LoadOptions

    told: Any = options.told(context, LoadOptions)
    with options.connected(address) as client:
        delta = client.deltas.load(name, source, **told)
    _show(delta, json)


@app.command("ls")
def list_(json: options.Json = False, address: options.Address = None, timeout: options.Timeout = None) -> None:
    """List all deltas and their versions."""
    with options.connected(address) as client:
        deltas = list(client.deltas.list(timeout=timeout))
    if json:
        screen.as_json(deltas)
        return
    rows = [
        (
            each.reference,
            " ".join(each.kinds),
            (each.task or "").replace("_", " "),
            screen.amount(each.parameters),
            screen.size(each.device_bytes),
            each.state,
            each.in_flight,
            len(each.warnings) or "",
        )
        for each in deltas
    ]
    columns = ("delta", "kinds", "task", "parameters", "on device", "state", "in use", "warnings")
    screen.table(columns, rows, right=("parameters", "on device", "in use", "warnings"))


@app.command()
def show(
    name: Reference, json: options.Json = False, address: options.Address = None, timeout: options.Timeout = None
) -> None:
    """Show all about one delta."""
    with options.connected(address) as client:
        delta = client.deltas.get(name, timeout=timeout)
    _show(delta, json)


@app.command()
def unload(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="name (all versions) or name@version.", show_default=False)
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Until running requests have ended and the memory is free.")
    ] = False,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Take a delta out of service; running requests finish."""
    with options.connected(address) as client:
        gone = client.deltas.unload(name, wait=wait or None, timeout=timeout)
    if json:
        screen.as_json(gone)
    else:
        names = ", ".join(each.reference for each in gone.deltas)
        so_far = "" if wait else " so far"
        screen.line(f"unloaded {names}; {screen.size(gone.freed_bytes)} given back{so_far}")


def _show(delta: "DeltaInfo", json: bool) -> None:
    if json:
        screen.as_json(delta)
        return
    guessed = {name: " (guessed)" for name in delta.guessed}
    screen.facts(
        (
            ("delta", delta.reference),
            ("state", delta.state),
            ("kinds", ", ".join(delta.kinds)),
            ("task", f"{(delta.task or '').replace('_', ' ')}{guessed.get('task', '')}"),
            ("task id", delta.task_id),
            ("labels", delta.labels and f"{', '.join(delta.labels)}{guessed.get('labels', '')}"),
            ("problem type", f"{(delta.problem_type or '').replace('_', ' ')}{guessed.get('problem_type', '')}"),
            ("sites", delta.sites),
            ("parameters", screen.amount(delta.parameters)),
            ("tensors", delta.tensors_matched),
            ("file", screen.size(delta.file_bytes)),
            ("on device", screen.size(delta.device_bytes)),
            ("shared on device", screen.size(delta.shared_bytes) if delta.shared_bytes else None),
            ("in use", f"by {delta.in_flight} requests"),
            ("source", f"{delta.source} ({delta.format})"),
            ("made for", delta.base_model),
            ("content", delta.content_hash),
            *(("warning", warning) for warning in delta.warnings),
        )
    )
