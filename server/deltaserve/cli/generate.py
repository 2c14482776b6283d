"""`deltaserve generate`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.cli import options, screen, texts
from deltaserve.cli.options import SAMPLING

if TYPE_CHECKING:
    from deltaserve_client import Client, GenerateResult, Input, PositionLogprobs


def generate(
    context: typer.Context,
    inputs: options.Inputs,
    deltas: options.Deltas = None,
    delta_weights: options.Weights = None,
    backbone: options.Backbone = None,
    stream: Annotated[
        bool, typer.Option("--stream", "-s", help="Print the text as it is made.", show_default=False)
    ] = False,
    json: options.Json = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-m",
            min=1,
            help="Tokens to generate at most.",
            show_default="128, or the room left",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(min=0, help="No end before this many.", show_default="0", rich_help_panel=SAMPLING)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            min=0,
            max=100,
            help="Divides the logits; 0 is greedy.",
            show_default="greedy",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Keep the k most likely tokens.", show_default="all", rich_help_panel=SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep the likeliest tokens up to this probability.",
            show_default="1",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Keep tokens this likely relative to the likeliest.",
            show_default="0",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0, help="Above 1 discourages repetition.", show_default="1", rich_help_panel=SAMPLING),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            min=-2,
            max=2,
            help="Off the logit of tokens already in the output.",
            show_default="0",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            min=-2, max=2, help="The same, for each time they occurred.", show_default="0", rich_help_panel=SAMPLING
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.", rich_help_panel=SAMPLING)
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            min=1,
            max=16,
            help="Samples of each input; more than 1 needs a temperature.",
            show_default="1",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.", rich_help_panel=SAMPLING),
    ] = None,
    stop_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-id", min=0, max=2**32 - 1, help="End after this token; repeatable.", rich_help_panel=SAMPLING
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos", help="Go on past end tokens.", show_default=False, rich_help_panel=SAMPLING),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="Show log-probabilities, and so many alternatives.", rich_help_panel=SAMPLING),
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(min=0, max=20, help="The same for the input's tokens.", rich_help_panel=SAMPLING)
    ] = None,
    ids: options.Ids = False,
    pairs: options.Pairs = None,
    add_special_tokens: options.Special = None,
    truncate: options.Truncate = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Continue or answer texts, with a delta or with the bare backbone.

    One input: its text is all that is printed. Several: a table on a terminal, one line for each in a pipe.
    """  # fmt: skip
    from deltaserve_client.options import GenerateOptions

    given = texts.inputs(inputs, ids, pairs)
    told: Any = options.told(context, GenerateOptions)
    with options.connected(address) as client:
        if stream:
            _stream(client, given, told, json, n or 1)
            return
        result = client.generate(given, **told)
    if json:
        screen.as_json(result)
    else:
        _show(result, given)


def _show(result: "GenerateResult", given: "Sequence[Input]") -> None:
    samples = [(place, sample) for place, each in enumerate(result.results) for sample in each.samples]
    if len(samples) == 1 or not screen.console().is_terminal:
        for _, sample in samples:
            screen.line(sample.text or _numbers(sample.ids))
    else:
        rows = [
            (texts.shown(given[place]), sample.text or _numbers(sample.ids), sample.finish_reason or "")
            for place, sample in samples
        ]
        screen.table(("input", "output", "end"), rows)
    for each in result.results:
        _show_positions("input", each.prompt_logprobs)
        for sample in each.samples:
            _show_positions("output", sample.logprobs)


def _show_positions(title: str, positions: "Sequence[PositionLogprobs]") -> None:
    if not positions:
        return
    rows = []
    for each in positions:
        others = "  ".join(f"{other.token or other.id} {other.logprob:.3f}" for other in each.top)
        rows.append((each.chosen.token or each.chosen.id, f"{each.chosen.logprob:.4f}", each.chosen.rank, others))
    screen.table((title, "logprob", "rank", "likeliest"), rows, right=("logprob", "rank"))


def _stream(client: "Client", given: "Sequence[Input]", told: Any, json: bool, n: int) -> None:
    """One sample is printed piece by piece; of several, each when it is whole, after its place."""
    single = len(given) * n == 1
    made: dict[tuple[int, int], _Made] = {}
    with client.stream(given, **told) as pieces:
        for piece in pieces:
            if json:
                screen.as_json(piece, indent=False)
                continue
            sample = made.setdefault((piece.input_index, piece.sample_index), _Made())
            sample.text += piece.text
            sample.ids += piece.ids
            if single:
                typer.echo(piece.text, nl=False)
            if piece.finish_reason is None:
                continue
            if single:
                screen.line("" if sample.text else _numbers(sample.ids))
            else:
                place = str(piece.input_index) if n == 1 else f"{piece.input_index}.{piece.sample_index}"
                screen.line(f"{place}\t{sample.text or _numbers(sample.ids)}")


@dataclass
class _Made:
    """What has come of one sample; a backbone without a tokenizer gives ids and no text."""

    text: str = ""
    ids: tuple[int, ...] = ()


def _numbers(ids: Iterable[int]) -> str:
    return " ".join(str(each) for each in ids)
