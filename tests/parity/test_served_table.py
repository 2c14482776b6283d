"""The table of what is served where is what PEFT and the formats room say today; see served.py."""

import pytest
import served
import served_recorded
from families import FAMILIES
from methods import cases

FAMILY = "gpt2"
"""The one that PEFT can do least on: its column has every sign."""


@pytest.fixture(scope="module")
def written() -> str:
    return served.README.read_text(encoding="utf-8")


def test_every_method_has_its_row(written: str) -> None:
    titles = {served.title(row) for row in served.ROWS}
    for family in FAMILIES:
        assert served.marks(written, family).keys() == titles, "run python tests/parity/served.py"
        tried = {served.title((case.method, None)) for case in cases(family) if case.task == FAMILIES[family].task}
        signs = {served.marks(written, family)[title] for title in tried}
        assert signs == {served.COMPARED}


def test_column_is_not_stale(written: str, tmp_path: object) -> None:
    with served.quiet():
        cells = served.column(FAMILY, tmp_path)
    found = {served.title(row): cell.mark for row, cell in cells.items()}
    assert found == served.marks(written, FAMILY), "run python tests/parity/served.py"


def test_nothing_that_is_served_differs(written: str) -> None:
    assert served.DIFFERS not in {sign for family in FAMILIES for sign in served.marks(written, family).values()}


def test_part_of_the_recorded_libraries_is_not_stale(written: str) -> None:
    with served.quiet():
        assert written.endswith("\n\n" + served_recorded.part()), "run python tests/parity/served_recorded.py"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_file_is_not_stale(written: str) -> None:
    with served.quiet():
        assert served.whole() == written, "run python tests/parity/served.py"
