"""How much work a lowering may be, and who is told how far it has come."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def _nobody(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """`told(done, total)` is called as modules are done.

    A lowering that is expected to take longer than `seconds` is refused, None refuses none; `command` is what the
    refusal tells to do instead.
    """

    seconds: float | None = None
    told: Callable[[int, int], None] = _nobody
    command: str = "deltaserve convert SOURCE DESTINATION --backbone BACKBONE"

    def steps(self, modules: Sequence[T]) -> Iterator[T]:
        """The modules one by one; what is done with each is told."""
        for done, module in enumerate(modules):
            self.told(done, len(modules))
            yield module
        self.told(len(modules), len(modules))


UNLIMITED = Work()
