"""`deltaserve score`."""

from typing import Annotated, Any

import typer

from deltaserve.cli import options, screen, texts


def score(
    context: typer.Context,
    inputs: options.Inputs,
    continuations: Annotated[
        list[str],
        typer.Option(
            "--continuation", "-c", metavar="TEXT", help="What may follow each input (ids with --ids); repeatable."
        ),
    ],
    deltas: options.Deltas = None,
    delta_weights: options.Weights = None,
    backbone: options.Backbone = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Also that many alternatives at each position (--json shows them)."),
    ] = None,
    json: options.Json = False,
    ids: options.Ids = False,
    pairs: options.Pairs = None,
    add_special_tokens: options.Special = None,
    truncate: options.Truncate = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Say how likely continuations are, after each of the inputs."""
    from deltaserve_client.options import ScoreOptions

    given = texts.inputs(inputs, ids, pairs)
    asked: list[Any] = [texts.ids(each) for each in continuations] if ids else list(continuations)
    told: Any = options.told(context, ScoreOptions)
    with options.connected(address) as client:
        result = client.score(given, [asked] * len(given), **told)
    if json:
        screen.as_json(result)
        return
    rows = [
        (texts.shown(input), continuation, f"{one.logprob:.4f}", "greedy" if one.greedy else "")
        for input, each in zip(given, result.results, strict=True)
        for continuation, one in zip(continuations, each.scores, strict=True)
    ]
    screen.table(("input", "continuation", "logprob", ""), rows, right=("logprob",))
