"""`python -m bench`, from the repository's root."""

import os

# As in `deltaserve serve`: threads sleep at barriers. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench.program import app

app(prog_name="python -m bench")
