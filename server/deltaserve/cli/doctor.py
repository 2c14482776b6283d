"""`deltaserve doctor`."""

from typing import Annotated

import typer

from deltaserve.cli import options, screen

PROBE_SECONDS = 3.0
"""A probe that takes longer has its answer: not now."""


def doctor(
    grpc: Annotated[
        str | None,
        typer.Option("--grpc", metavar="HOST:PORT", help="Only ask this server whether it serves: 0 yes, 1 no."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Look at this machine: versions, device, kernels, memory, disk, ports. Exits with 1 if something is broken."""
    raise typer.Exit(_machine(json) if grpc is None else _probe(grpc, json))


def _probe(address: str, json: bool) -> int:
    from deltaserve_client import Client, DeltaserveError

    try:
        with Client(address) as client:
            serving = client.healthy(timeout=PROBE_SECONDS)
        found = f"{address} is {'serving' if serving else 'not serving'}"
    except DeltaserveError as error:
        serving, found = False, error.message
    if json:
        screen.as_json({"address": address, "serving": serving, "found": found})
    else:
        screen.line(found)
    return 0 if serving else 1


def _machine(json: bool) -> int:
    from deltaserve.cli.checks import BAD, CHECKS

    findings = [finding for check in CHECKS for finding in check()]
    if json:
        screen.as_json(findings)
    else:
        rows = [(each.state, each.name, each.found, each.hint) for each in findings]
        screen.table(("", "what", "found", "what to do"), rows)
    return 1 if any(each.state == BAD for each in findings) else 0
