"""What a command asks about: its arguments, lines of standard input, token ids, pairs."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from deltaserve_client import Input


def read(arguments: Sequence[str]) -> list[str]:
    """The arguments, `-` replaced by the lines of standard input that are not blank. Raises BadParameter."""
    if list(arguments).count("-") > 1:
        raise typer.BadParameter("standard input can be read once", param_hint="INPUT")
    texts: list[str] = []
    for argument in arguments:
        texts += [line.rstrip("\r\n") for line in sys.stdin if line.strip()] if argument == "-" else [argument]
    if not texts:
        raise typer.BadParameter("standard input has no lines", param_hint="INPUT")
    for text in texts:
        if not _encodable(text):
            raise typer.BadParameter(f"{text!r:.80} is not UTF-8", param_hint="INPUT")
    return texts


def inputs(
    arguments: Sequence[str], as_ids: bool, pairs: Sequence[str] | None, choices: Sequence[str] | None = None
) -> "list[Input]":
    """What the client takes; every input has all of the choices. Raises BadParameter."""
    from deltaserve_client import Input

    texts = read(arguments)
    if choices:
        if as_ids or pairs:
            raise typer.BadParameter("goes with texts, without --ids and --pair", param_hint="--choice")
        return [Input(text, choices=choices) for text in texts]
    if as_ids and pairs:
        raise typer.BadParameter("goes with texts, not with --ids", param_hint="--pair")
    if as_ids:
        return [Input(ids=ids(text)) for text in texts]
    if not pairs:
        return [Input(text) for text in texts]
    if len(pairs) != len(texts):
        raise typer.BadParameter(f"{len(pairs)} for {len(texts)} inputs", param_hint="--pair")
    return [Input(text, pair) for text, pair in zip(texts, pairs, strict=True)]


def ids(text: str) -> list[int]:
    """`1,2,3` or `1 2 3`. Raises BadParameter."""
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() and int(part) < 1 << 32 for part in parts):
        raise typer.BadParameter(f"{text!r:.80} is not a list of token ids like 101,7592,102", param_hint="INPUT")
    return [int(part) for part in parts]


def shown(given: "Input") -> str:
    """An input as a table shows it."""
    if given.ids is not None:
        return " ".join(str(each) for each in given.ids)
    return str(given.text) if given.text_pair is None else f"{given.text} ⏐ {given.text_pair}"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
