"""What a command needs that the extra `cli` does not bring."""

from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("deltaserve", "deltaserve_client", "deltaserve_kernels", "deltaserve_protos")


class NotInstalled(Exception):
    """A command needs `module`, which the extra `extra` brings."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"this command needs {module}, which is not installed")
        self.extra = extra


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: a foreign module that is missing becomes NotInstalled."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module in OURS:
            raise
        raise NotInstalled(module, extra) from error
