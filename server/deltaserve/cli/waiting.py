"""How threads of a product wait for each other. Told before torch is loaded, which reads it once."""

import os
from collections.abc import MutableMapping

SPINS = "1000"


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Threads spin for some µs at a barrier, then sleep; where the environment says how they wait, that holds.

    24 layers' small products and attention on two cores: 32 ms, 40 where threads sleep at once and must be woken each
    time. Beside a process that keeps one core busy: 81 ms, 74 where they sleep at once, 60 to 450 where they spin as
    long as GNU's default has them.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPINS
