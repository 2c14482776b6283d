"""The flags that several commands share, and the client that they lead to.

A parameter is named as the client's keyword is, so that `told` can hand a command's flags over as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from deltaserve_client import Client

CONNECTION, TOKENS, SAMPLING = "Connection", "Tokens", "Sampling"

Address: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        envvar="DELTASERVE_ADDRESS",
        metavar="HOST:PORT",
        help="Where the server listens.",
        show_default="127.0.0.1:9000",
        rich_help_panel=CONNECTION,
    ),
]
Timeout: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=0,
        metavar="SECONDS",
        help="How long an answer may take.",
        show_default="600",
        rich_help_panel=CONNECTION,
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, with all there is.", show_default=False)]

Inputs: TypeAlias = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Texts; `-` stands for the lines of standard input.")
]
Deltas: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--delta",
        "-d",
        metavar="NAME",
        help="Who answers: name, name@version or tenant/name; several act as one, in order.",
    ),
]
Weights: TypeAlias = Annotated[
    list[float] | None,
    typer.Option(
        "--delta-weight",
        metavar="NUMBER",
        help="What a delta adds is multiplied by it; once for each --delta, in order.",
        show_default="1 for each",
    ),
]
Backbone: TypeAlias = Annotated[
    bool | None, typer.Option("--backbone", help="Ask the bare backbone, on purpose.", show_default=False)
]
Ids: TypeAlias = Annotated[
    bool,
    typer.Option("--ids", help="The inputs are token ids: `101,7592,102`.", show_default=False, rich_help_panel=TOKENS),
]
Pairs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--pair", metavar="TEXT", help="Second segment; once for each input.", rich_help_panel=TOKENS),
]
Special: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="Let the tokenizer add its special tokens.",
        show_default="add them",
        rich_help_panel=TOKENS,
    ),
]
Truncate: TypeAlias = Annotated[
    Literal["none", "start", "end"] | None,
    typer.Option(
        "--truncate",
        help="Where to leave tokens out of an input that is too long; none makes it an error.",
        show_default="none",
        rich_help_panel=TOKENS,
    ),
]

Task: TypeAlias = Annotated[
    Literal[
        "generation",
        "sequence_classification",
        "token_classification",
        "embedding",
        "question_answering",
        "multiple_choice",
    ]
    | None,
    typer.Option("--task", help="What it does.", show_default="from the checkpoint"),
]
Labels: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="LABEL",
        help="Name of a head's output; once for each, in order.",
        show_default="from the checkpoint",
    ),
]
ProblemType: TypeAlias = Annotated[
    Literal["regression", "single_label_classification", "multi_label_classification"] | None,
    typer.Option("--problem-type", help="What the head's outputs mean.", show_default="from the checkpoint"),
]
TaskId: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--task-id",
        min=0,
        max=(1 << 32) - 1,
        metavar="NUMBER",
        help="Which task's delta to make of a checkpoint or a setup for several, from 0.",
        show_default="the only one",
    ),
]


@contextmanager
def connected(address: str | None, timeout: float | None = None) -> Iterator["Client"]:
    """A client that is closed in the end. `timeout` None is the client's own."""
    from deltaserve_client import Client

    with Client(address) if timeout is None else Client(address, timeout=timeout) as client:
        yield client


def told(context: typer.Context, keywords: type) -> Mapping[str, Any]:
    """Of the command's parameters those that are keywords of the client's call, where they were given."""
    known = keywords.__annotations__
    given = {name: value for name, value in context.params.items() if name in known}
    return {name: value for name, value in given.items() if value not in (None, (), [])}
