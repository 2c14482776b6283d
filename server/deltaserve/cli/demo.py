"""`deltaserve demo`."""

from typing import Annotated

import typer

from deltaserve.cli import options
from deltaserve.cli.extra import needs


def demo(
    json: options.Json = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server running until Ctrl-C.", show_default=False)
    ] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the server; 0 picks a free one.")] = 0,
) -> None:
    """Start a server on a small built-in model, load deltas into it under traffic, and send one mixed batch."""
    with needs("server"):
        from deltaserve.demo.show import run
    raise typer.Exit(run(json=json, keep=keep, port=port))
