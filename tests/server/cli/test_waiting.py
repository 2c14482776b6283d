"""Threads spin briefly, unless the environment says how they wait."""

import pytest

from deltaserve.cli.waiting import SPINS, spin_briefly


@pytest.mark.parametrize("told", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}])
def test_what_the_environment_says_holds(told: dict[str, str]) -> None:
    environment = dict(told)
    spin_briefly(environment)
    assert environment == told


def test_else_they_spin_briefly() -> None:
    environment: dict[str, str] = {"OMP_NUM_THREADS": "2"}
    spin_briefly(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": SPINS}
