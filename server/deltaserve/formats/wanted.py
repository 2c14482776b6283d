"""What an operator says of a checkpoint, where it does not say it itself."""

from dataclasses import dataclass

from deltaserve.deltas.sites import Task


@dataclass(frozen=True)
class Wanted:
    """Unset: from the checkpoint, else guessed. `labels` is as long as the head is wide, or empty.

    `task_id`: which of the tasks, from 0, that the checkpoint was made for; it must be said where there are several.
    """

    task: Task | None = None
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    task_id: int | None = None


NOTHING_WANTED = Wanted()
