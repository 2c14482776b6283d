"""`deltaserve classify`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deltaserve.cli import options, screen, texts

if TYPE_CHECKING:
    from deltaserve_client import Classification, ClassifyResult, Input


def classify(
    context: typer.Context,
    inputs: options.Inputs,
    deltas: options.Deltas = None,
    delta_weights: options.Weights = None,
    backbone: options.Backbone = None,
    scores_as: Annotated[
        Literal["raw", "softmax", "sigmoid"] | None,
        typer.Option("--scores-as", help="How scores are returned.", show_default="what fits the head"),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option("--choice", "-c", metavar="TEXT", help="Multiple choice: may follow each input; repeatable."),
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
    """Label texts or their tokens, answer questions by spans of `--pair`, or choose: what the delta's head is for."""
    from deltaserve_client.options import ClassifyOptions

    given = texts.inputs(inputs, ids, pairs, choices)
    told: Any = options.told(context, ClassifyOptions)
    with options.connected(address) as client:
        result = client.classify(given, **told)
    if json:
        screen.as_json(result)
    else:
        _show(result, given)


def _show(result: "ClassifyResult", given: "Sequence[Input]") -> None:
    """Of one delta all results are of one kind."""
    both = list(zip(given, result.results, strict=True))
    if any(each.choice is not None for _, each in both):
        _show_choices(both)
    elif any(each.spans is not None for _, each in both):
        _show_spans(both)
    elif any(each.tokens is not None for _, each in both):
        for _, each in both:
            labelled = [(t.token or t.id, t.label, *_scores(t.scores)) for t in each.tokens or ()]
            screen.table(("token", "label", *result.labels), labelled, right=result.labels)
    else:
        rows = [(texts.shown(input), each.label, *_scores(each.scores)) for input, each in both]
        screen.table(("input", "label", *result.labels), rows, right=result.labels)


def _show_choices(both: "Sequence[tuple[Input, Classification]]") -> None:
    rows = [
        (texts.shown(input), choice, f"{score:.4f}", "best" if place == each.choice else "")
        for input, each in both
        for place, (choice, score) in enumerate(zip(input.choices or (), each.scores, strict=True))
    ]
    screen.table(("input", "choice", "score", ""), rows, right=("score",))


def _show_spans(both: "Sequence[tuple[Input, Classification]]") -> None:
    rows = [
        (texts.shown(input), span.text, f"{span.score:.4f}", f"{span.start_token} to {span.end_token}")
        for input, each in both
        for span in each.spans or ()
    ]
    screen.table(("input", "answer", "score", "tokens"), rows, right=("score",))


def _scores(scores: Sequence[float]) -> list[str]:
    return [f"{score:.4f}" for score in scores]
