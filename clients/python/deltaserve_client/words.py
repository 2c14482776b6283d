"""The contract's enums as lower-case words: `TRUNCATE_START` is `start`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve_protos.v1 import deltas_pb2, inference_pb2


@dataclass(frozen=True)
class Words:
    """One enum. `enum` is the generated wrapper, `prefix` what all its names begin with."""

    enum: Any
    prefix: str

    @property
    def all(self) -> Sequence[str]:
        """Every word but the unspecified one."""
        return [name.removeprefix(self.prefix).lower() for name, number in self.enum.items() if number]

    def number(self, field: str, word: str) -> int:
        """Raises ValueError, naming `field`, where it is none of `all`."""
        if word not in self.all:
            raise ValueError(f"{field}: {word!r} is none of {', '.join(self.all)}")
        return int(self.enum.Value(self.prefix + word.upper()))

    def word(self, number: int) -> str | None:
        """None for the unspecified one; the number itself where a newer server knows more words than we do."""
        if number == 0:
            return None
        name = dict((value, key) for key, value in self.enum.items()).get(number)
        return str(number) if name is None else str(name).removeprefix(self.prefix).lower()


TRUNCATE = Words(inference_pb2.Truncate, "TRUNCATE_")
SCORES_AS = Words(inference_pb2.ScoresAs, "SCORES_AS_")
POOLING = Words(inference_pb2.Pooling, "POOLING_")
FINISH_REASON = Words(inference_pb2.FinishReason, "FINISH_REASON_")
TASK = Words(deltas_pb2.Task, "TASK_")
PROBLEM_TYPE = Words(deltas_pb2.ProblemType, "PROBLEM_TYPE_")
DELTA_STATE = Words(deltas_pb2.DeltaState, "DELTA_STATE_")
