"""`deltaserve serve`: each flag is a field of `config.Settings`, which alone knows the defaults; here they are told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltaserve.cli.extra import needs
from deltaserve.cli.waiting import spin_briefly

LISTENING, MODEL, DELTAS, LIMITS, MEMORY, LOGS = "Listening", "Backbone", "Deltas", "Limits", "Memory", "Logs"

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def serve(
    context: typer.Context,
    backbone: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            envvar="DELTASERVE_BACKBONE",
            help="Folder of a transformers model (safetensors), or its id on the Hub.",
            show_default=False,
        ),
    ],
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on. Any but loopback needs --insecure.",
            show_default="127.0.0.1",
            rich_help_panel=LISTENING,
        ),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Port of gRPC; 0 picks one and prints it.", show_default="9000", rich_help_panel=LISTENING),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Port of the Prometheus endpoint; 0 picks one and prints it.",
            show_default="9400",
            rich_help_panel=LISTENING,
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure",
            help="Allow an address that others can reach, without keys or TLS.",
            show_default=False,
            rich_help_panel=LISTENING,
        ),
    ] = None,
    served_name: Annotated[
        str | None,
        typer.Option(
            "--served-name",
            "--served-model-name",
            help="What the backbone is called in answers.",
            show_default="its name",
            rich_help_panel=MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit on the Hub.", show_default="main", rich_help_panel=MODEL),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or id of the tokenizer.", show_default="the backbone's", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the backbone. auto: bfloat16 on GPUs and on CPUs that multiply it natively, else float32.",
            show_default="auto",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="auto|cpu|cuda[:n]", help="Where the model runs.", show_default="auto", rich_help_panel=MODEL
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the engine.", show_default="from the usable cores", rich_help_panel=MODEL),
    ] = None,
    delta: Annotated[
        list[str] | None,
        typer.Option(
            "--delta",
            "--lora-modules",
            metavar="NAME=PATH",
            help="A delta to load at start; repeatable. Relative paths are tried under --delta-root.",
            rich_help_panel=DELTAS,
        ),
    ] = None,
    delta_root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that `deltas load` may read from; without it nothing is loaded later.",
            rich_help_panel=DELTAS,
        ),
    ] = None,
    delta_dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the deltas on the device. auto: as in their files.", show_default="auto", rich_help_panel=DELTAS
        ),
    ] = None,
    lowering_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A checkpoint whose lowering would take longer is refused: `deltaserve convert` does it ahead. "
            "0 refuses all that computes with whole weights.",
            show_default="30",
            rich_help_panel=DELTAS,
        ),
    ] = None,
    allow_pickle_archives: Annotated[
        bool | None,
        typer.Option(
            "--allow-pickle-archives",
            help="Also read .bin checkpoints (weights only, bounded); AdapterHub's prefixes, OpenDelta's all.",
            show_default=False,
            rich_help_panel=DELTAS,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of one sequence.", show_default="what the backbone can take", rich_help_panel=LIMITS),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Sequences in one forward.", show_default="64", rich_help_panel=LIMITS)
    ] = None,
    max_queued: Annotated[
        int | None,
        typer.Option(help="Sequences that may wait; more are refused.", show_default="1024", rich_help_panel=LIMITS),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(help="Rows of one forward.", show_default="from the device", rich_help_panel=LIMITS),
    ] = None,
    batch_wait_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="How long the first waiting request lets a batch gather.",
            show_default="0",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_message_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of one message, in and out.", show_default="16MiB", rich_help_panel=LIMITS),
    ] = None,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="For calls without a deadline.", show_default="600", rich_help_panel=LIMITS
        ),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="What running requests get at the end.", show_default="30", rich_help_panel=LIMITS
        ),
    ] = None,
    pool_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device memory for deltas, like 8GiB. auto: an eighth of what is free, 1GiB at most.",
            show_default="auto",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device memory for keys and values. auto: from what is free.",
            show_default="auto",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    memory_fraction: Annotated[
        float | None,
        typer.Option(
            "--memory-fraction",
            "--gpu-memory-utilization",
            help="Share of a GPU's memory that may be used, where --kv-bytes is auto.",
            show_default="0.9",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    log_format: Annotated[
        Literal["auto", "console", "json"] | None,
        typer.Option(
            help="auto: console on a terminal, else one JSON object a line.", show_default="auto", rich_help_panel=LOGS
        ),
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="debug also logs each request that worked.", show_default="info", rich_help_panel=LOGS),
    ] = None,
) -> None:
    """Serve a backbone and its deltas over gRPC until SIGTERM or Ctrl-C.

    A flag that is not given is taken from the environment, DELTASERVE_GRPC_PORT for --grpc-port, then by default.
    """  # fmt: skip
    with needs("server"):
        from deltaserve.config import settings
    chosen = settings(given(context.params))  # before torch is imported: what is wrong here is told at once
    spin_briefly()
    with needs("server"):
        from deltaserve.app import serve as run
    raise typer.Exit(run(chosen))


def given(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The flags that were given; all others are left to the environment and the defaults."""
    return {name: value for name, value in parameters.items() if value not in (None, (), [])}
