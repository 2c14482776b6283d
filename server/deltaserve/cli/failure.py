"""An error as a reader of a terminal gets it: what, where, what to do, and a word to search for."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaserve.cli.extra import NotInstalled

FAILED, USAGE, UNREACHABLE = 1, 2, 3

HINTS: Mapping[str, str] = {
    "UNREACHABLE": "is a server running there? `deltaserve serve BACKBONE` starts one; --address names another",
    "NO_DELTA": "--delta NAME says who answers; --backbone asks the bare backbone",
    "NO_DELTA_ROOT": "or name it at the start: --delta NAME=PATH",
    "DELTA_NOT_FOUND": "`deltaserve deltas ls` shows what the server has",
    "DELTA_EXISTS": "--replace makes it the next version",
    "OTHER_WEIGHTS": "`deltaserve convert` makes it again, from the checkpoint and this backbone",
    "INPUT_TOO_LONG": "--truncate start or --truncate end leaves tokens out",
    "NO_TOKENIZER": "--ids takes the inputs as token ids",
    "DEADLINE": "--timeout SECONDS gives it longer",
    "DEADLINE_EXCEEDED": "--timeout SECONDS gives it longer",
    "UNIMPLEMENTED": "what answers there is no deltaserve of this release",
    "INTERNAL": "the server's log has the rest, under this request id",
    "BUG": "the server's log has the rest, under this request id",
    "BAD_CONFIGURATION": "`deltaserve serve --help` shows every flag",
}
"""By reason. A server's message often says what to do; this is what is done at the command line."""

EXIT_CODES: Mapping[str, int] = {"UNREACHABLE": UNREACHABLE, "BAD_CONFIGURATION": USAGE}
"""By reason; all others have FAILED."""


@dataclass(frozen=True)
class Failure:
    what: str
    field: str | None
    hint: str | None
    reason: str | None
    request_id: str
    exit_code: int

    def show(self) -> None:
        """One block on stderr."""
        console = Console(stderr=True, highlight=False)
        console.print(Text.assemble(("error: ", "bold red"), self.what), soft_wrap=True)
        rows = (("field", self.field), ("hint", self.hint), ("reason", self.reason), ("request", self.request_id))
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            if value:
                table.add_row(f"  {name}", Text(value))
        if table.rows:
            console.print(table)


def failure(error: Exception) -> Failure | None:
    """None for what is nobody's mistake but ours: that deserves its traceback."""
    from deltaserve.errors import DeltaserveError as FromHere
    from deltaserve_client import DeltaserveError as FromServer

    if isinstance(error, NotInstalled):
        return Failure(str(error), None, f"pip install 'deltaserve[{error.extra}]'", "NOT_INSTALLED", "", FAILED)
    if isinstance(error, FromServer):
        code, request_id = error.code, error.request_id
    elif isinstance(error, FromHere):
        code, request_id = error.status, ""
    else:
        return None
    hints = [HINTS.get(error.reason, "")]
    if error.retry_after is not None:
        hints.append(f"try again in {error.retry_after:g} s")
    return Failure(
        what=error.message,
        field=error.field,
        hint="; ".join(hint for hint in hints if hint),
        reason=error.reason if error.reason in (code, "UNREACHABLE") else f"{error.reason} ({code})",
        request_id=request_id,
        exit_code=EXIT_CODES.get(error.reason, FAILED),
    )
