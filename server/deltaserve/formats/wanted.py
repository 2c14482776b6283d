"""What an operator says of a checkpoint, where it does not say it itself."""

from dataclasses import dataclass

from deltaserve.deltas.sites import Task


@dataclass(frozen=True)
class Wanted:
    """Unset: from the checkpoint, else guessed. `labels` is as long as the head is wide, or empty."""

    task: Task | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None


NOTHING_WANTED = Wanted()
