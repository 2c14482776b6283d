"""A real server process: started on a free port, watched while it comes up, ended with SIGTERM."""

import json
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

from deltaserve.demo.tasks import BACKBONE
from deltaserve.errors import Unavailable

START_SECONDS, STOP_SECONDS = 60.0, 40.0
_LINES_KEPT = 40


class Server:
    """`deltaserve serve` as a child. In `with`, it is ended on leaving, whatever happened.

    `address` is where it answers, once `start` has returned.
    """

    def __init__(self, backbone: Path, delta_root: Path, port: int) -> None:
        self._command = [
            *(sys.executable, "-m", "deltaserve", "serve", str(backbone)),
            # Said, because a container's DELTASERVE_HOST is another.
            *("--host", "127.0.0.1", "--grpc-port", str(port), "--metrics-port", "0", "--delta-root", str(delta_root)),
            # Small, whatever the machine has to give: on a GPU the default would take nearly all of it.
            *("--served-name", BACKBONE, "--kv-bytes", "64MiB", "--pool-bytes", "64MiB"),
            # fp32, so that what is compared does not hang on rounding; the wait lets one batch gather.
            *("--dtype", "float32", "--batch-wait-ms", "100", "--log-format", "json"),
        ]
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._told = threading.Event()  # it is ready, or its output ended
        self.address = ""

    def start(self) -> None:
        """Returns when the server says that it is ready. Raises Unavailable, with the end of its log."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us; we then end it in order
        )
        self._reader = threading.Thread(target=self._read, name="server's log", daemon=True)
        self._reader.start()
        try:
            self._told.wait(START_SECONDS)
        except BaseException:  # Ctrl-C: nobody else would end it
            self.stop()
            raise
        if not self.address:
            self.stop()
            raise Unavailable(
                f"the server did not start; the end of its log:\n{self.log()}", reason="SERVER_NOT_STARTED"
            )

    def stop(self) -> int | None:
        """SIGTERM, then its exit status; None where it had to be killed."""
        process = self._process
        if process is None:
            return 0
        process.terminate()
        try:
            status: int | None = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        self._reader.join(5)
        self._process = None
        return status

    def wait(self) -> None:
        """Until the server ends by itself."""
        if self._process is not None:
            self._process.wait()

    def log(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(self._lines)

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._lines.append(line.rstrip())
                if not self._told.is_set():
                    self._hear(line)
        self._told.set()

    def _hear(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a library's own words
        if isinstance(event, dict) and event.get("event") == "ready":
            self.address = str(event["grpc"])
            self._told.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
