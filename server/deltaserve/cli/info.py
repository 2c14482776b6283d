"""`deltaserve info`."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve.cli import options, screen

if TYPE_CHECKING:
    from deltaserve_client import ServerInfo

SHOWN = 20
"""Steps that a terminal gets to see."""


def info(
    steps: Annotated[
        bool,
        typer.Option("--steps", help=f"Also the last forwards: {SHOWN}, or 1,000 with --json.", show_default=False),
    ] = False,
    json: options.Json = False,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show what a server is, what it can do and what it is doing."""
    with options.connected(address) as client:
        server = client.server_info(steps=steps, timeout=timeout)
    if json:
        screen.as_json(server)
        return
    _show(server)
    if steps:
        _show_steps(server)


def _show(server: "ServerInfo") -> None:
    limits, memory = server.limits, server.memory
    kv = f"{screen.size(memory.kv_used_bytes)} of {screen.size(memory.kv_capacity_bytes)}"
    pool = f"{screen.size(memory.pool_used_bytes)} of {screen.size(memory.pool_capacity_bytes)}"
    resident = f"{server.resident} deltas resident"
    if server.combinations:
        resident += f", {server.combinations} of them made of several"
    screen.facts(
        (
            ("server", f"deltaserve {server.version}, up {_lasting(server.uptime)}"),
            ("backbone", f"{server.backbone} ({server.family}, {screen.amount(server.parameters)} parameters)"),
            ("device", f"{server.device}, {server.dtype}"),
            ("tokenizer", "yes" if server.has_tokenizer else "no: token ids only"),
            ("can", ", ".join(server.tasks)),
            ("kinds", ", ".join(server.kinds)),
            ("now", f"{server.running} running, {server.waiting} waiting, {resident}"),
            ("memory", f"backbone {screen.size(memory.backbone_bytes)}, keys and values {kv}, deltas {pool}"),
            ("a request", f"{limits.max_inputs} inputs, {limits.max_model_len} tokens each, "
                          f"{screen.size(limits.max_message_bytes)}"),
            ("a forward", f"{limits.max_batch_tokens} rows, {limits.max_running} sequences"),
            ("the queue", f"{limits.max_queued} sequences"),
        )
    )  # fmt: skip


def _show_steps(server: "ServerInfo") -> None:
    rows = [
        (
            step.index,
            datetime.fromtimestamp(step.started).strftime("%H:%M:%S.%f")[:-3],
            step.phase,
            f"{step.duration * 1000:.1f}",
            step.rows,
            step.sequences,
            " ".join(step.kinds),
            " ".join(step.deltas),
        )
        for step in server.steps[-SHOWN:]
    ]
    columns = ("step", "at", "phase", "ms", "rows", "sequences", "kinds", "deltas")
    screen.table(columns, rows, right=("step", "ms", "rows", "sequences"))


def _lasting(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s" if minute else f"{second} s"
