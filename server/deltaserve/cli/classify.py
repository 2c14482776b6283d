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
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, max=64, help="Question answering: that many spans of each.", show_default="1"),
    ] = None,
    max_answer_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-answer-tokens", min=1, max=512, help="Question answering: of a span at most.", show_default="15"
        ),
    ] = None,
    json: options.Json = False,
    ids: options.Ids = False,
    pairs: options.Pairs = None,
    add_special_tokens: options.Special = None,
    truncate: options.Truncate = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Label texts or each of their tokens, or answer questions by spans of `--pair`: what the delta's head is for."""
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
    both = list(zip(given, result.results, strict=True))
    answered = [(texts.shown(input), span) for input, each in both for span in each.spans or ()]
    if any(each.spans is not None for _, each in both):
        spans = [(input, s.text, f"{s.score:.4f}", f"{s.start_token} to {s.end_token}") for input, s in answered]
        screen.table(("input", "answer", "score", "tokens"), spans, right=("score",))
        return
    whole = [(input, each) for input, each in both if each.tokens is None]
    if whole:
        rows = [(texts.shown(input), each.label, *_scores(each.scores)) for input, each in whole]
        screen.table(("input", "label", *result.labels), rows, right=result.labels)
    for each in result.results:
        if each.tokens is not None:
            labelled = [(t.token or t.id, t.label, *_scores(t.scores)) for t in each.tokens]
            screen.table(("token", "label", *result.labels), labelled, right=result.labels)


def _scores(scores: Sequence[float]) -> list[str]:
    return [f"{score:.4f}" for score in scores]
