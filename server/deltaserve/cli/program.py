"""The commands together, and what becomes of their errors."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from deltaserve.cli import classify, convert, deltas, demo, doctor, embed, generate, info, score, serve
from deltaserve.cli.failure import Failure, failure

EPILOG = (
    "Commands that call a server take --address or DELTASERVE_ADDRESS, and --json for scripts. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no server answers."
)

app = typer.Typer(
    name="deltaserve",
    help="One frozen backbone, many deltas: every request names the one that answers it.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVERS, REQUESTS, OPERATIONS = "Servers", "Requests", "Operations"
for command, panel in (
    (serve.serve, SERVERS),
    (demo.demo, SERVERS),
    (generate.generate, REQUESTS),
    (classify.classify, REQUESTS),
    (embed.embed, REQUESTS),
    (score.score, REQUESTS),
    (info.info, OPERATIONS),
    (convert.convert, OPERATIONS),
    (doctor.doctor, OPERATIONS),
):
    app.command(rich_help_panel=panel)(command)
app.add_typer(deltas.app, name="deltas", rich_help_panel=OPERATIONS)


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"deltaserve {version('deltaserve')}")
        except PackageNotFoundError:
            typer.echo("deltaserve, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends with SystemExit. An error that is no bug of ours is one block on stderr."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="deltaserve")
    except Exception as error:
        told = failure(error)
        if told is None:
            raise
        _ended(told, error)


def _ended(told: Failure, error: Exception) -> None:
    told.show()
    raise SystemExit(told.exit_code) from error
