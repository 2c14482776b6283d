"""`deltaserve embed`."""

import math
from typing import Annotated, Any, Literal

import typer

from deltaserve.cli import options, screen, texts

SHOWN = 4
"""Values of a vector that a terminal gets to see."""


def embed(
    context: typer.Context,
    inputs: options.Inputs,
    deltas: options.Deltas = None,
    delta_weights: options.Weights = None,
    backbone: options.Backbone = None,
    pooling: Annotated[
        Literal["mean", "cls", "last"] | None,
        typer.Option("--pooling", help="How rows become one vector.", show_default="what fits the backbone"),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale each vector to length 1.", show_default="normalize"),
    ] = None,
    json: options.Json = False,
    ids: options.Ids = False,
    pairs: options.Pairs = None,
    add_special_tokens: options.Special = None,
    truncate: options.Truncate = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Turn texts into vectors. --json prints them whole."""
    from deltaserve_client.options import EmbedOptions

    given = texts.inputs(inputs, ids, pairs)
    told: Any = options.told(context, EmbedOptions)
    with options.connected(address) as client:
        result = client.embed(given, **told)
    if json:
        screen.as_json(result)
        return
    rows = []
    for input, each in zip(given, result.results, strict=True):
        first = " ".join(f"{value:.4f}" for value in each.values[:SHOWN])
        rest = " …" if len(each.values) > SHOWN else ""
        rows.append((texts.shown(input), len(each.values), f"{math.hypot(*each.values):.4f}", first + rest))
    screen.table(("input", "size", "length", f"values ({result.pooling})"), rows, right=("size", "length"))
