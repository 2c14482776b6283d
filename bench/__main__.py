"""`python -m bench`, from the repository's root."""

import os
import sys
from pathlib import Path

from deltaserve.cli.waiting import spin_briefly

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_ON_KERNELS = ("gpu", "tune")
"""Commands that run kernels wherever they are."""


def main() -> None:
    """The waiting of threads is that of `deltaserve serve`; it and Triton's interpreter are told before torch is
    imported.
    """
    spin_briefly()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    there = not hidden and any(Path(driver).exists() for driver in _DRIVERS)
    if sys.argv[1:2] and sys.argv[1] in _ON_KERNELS and (not there or "cpu" in sys.argv):
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.program import app

    app(prog_name="python -m bench")


main()
