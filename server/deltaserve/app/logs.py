"""Logs: ours and those of the libraries through one pipe, for people or one JSON object a line."""

import logging
import logging.config
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from deltaserve.config import Settings

_QUIET = {"asyncio": "WARNING", "filelock": "WARNING", "httpcore": "WARNING", "httpx": "WARNING", "urllib3": "WARNING"}


def for_people(settings: Settings) -> bool:
    """Whether somebody reads along."""
    return settings.log_format == "console" or (settings.log_format == "auto" and sys.stdout.isatty())


def configure(settings: Settings) -> None:
    """Everything that is logged in this process goes to standard output, in the form that was asked for."""
    people = for_people(settings)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people),
    ]
    ends: list[Any] = (
        [
            _short,
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(),
                sort_keys=False,
                # Rich ones show locals, and so what callers sent.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if people
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    formatter = {
        "()": structlog.stdlib.ProcessorFormatter,
        "foreign_pre_chain": [structlog.stdlib.PositionalArgumentsFormatter(), *shared],
        "processors": [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ends],
    }
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"ours": formatter},
            "handlers": {"out": {"class": "logging.StreamHandler", "stream": sys.stdout, "formatter": "ours"}},
            "root": {"handlers": ["out"], "level": "WARNING"},
            "loggers": {"deltaserve": {"level": settings.log_level.upper()}}
            | {name: {"level": level} for name, level in _QUIET.items()},
        }
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    logging.captureWarnings(True)
    _bridge_transformers(people)


def for_a_command() -> None:
    """Warnings are lines of standard error, and nobody else's progress bar is seen."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("deltaserve").setLevel(logging.WARNING)
    _bridge_transformers(people=False)


def _bridge_transformers(people: bool) -> None:
    """Its own handler would write beside ours; its progress bars are for terminals."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as theirs

    theirs.disable_default_handler()
    theirs.enable_propagation()
    theirs.set_verbosity_warning()
    if not (people and sys.stderr.isatty()):
        theirs.disable_progress_bar()
        disable_progress_bars()


def _short(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A terminal's line is for reading: no logger's name."""
    event.pop("logger", None)
    return event
