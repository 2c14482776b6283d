"""`deltaserve classify`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deltaserve.cli import options, screen, texts

if TYPE_CHECKING:
    from deltaserve_client import ClassifyResult, Input


def classify(
    context: typer.Context,
    inputs: options.Inputs,
    delta: options.Delta = None,
    backbone: options.Backbone = None,
    scores_as: Annotated[
        Literal["raw", "softmax", "sigmoid"] | None,
        typer.Option("--scores-as", help="How scores are returned.", show_default="what fits the head"),
    ] = None,
    json: options.Json = False,
    ids: options.Ids = False,
    pairs: options.Pairs = None,
    add_special_tokens: options.Special = None,
    truncate: options.Truncate = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Label texts, or each of their tokens, by the delta's head."""
    from deltaserve_client.options import ClassifyOptions

    given = texts.inputs(inputs, ids, pairs)
    told: Any = options.told(context, ClassifyOptions)
    with options.connected(address) as client:
        result = client.classify(given, **told)
    if json:
        screen.as_json(result)
    else:
        _show(result, given)


def _show(result: "ClassifyResult", given: "Sequence[Input]") -> None:
    whole = [(input, each) for input, each in zip(given, result.results, strict=True) if each.tokens is None]
    if whole:
        rows = [(texts.shown(input), each.label, *_scores(each.scores)) for input, each in whole]
        screen.table(("input", "label", *result.labels), rows, right=result.labels)
    for each in result.results:
        if each.tokens is not None:
            labelled = [(t.token or t.id, t.label, *_scores(t.scores)) for t in each.tokens]
            screen.table(("token", "label", *result.labels), labelled, right=result.labels)


def _scores(scores: Sequence[float]) -> list[str]:
    return [f"{score:.4f}" for score in scores]
