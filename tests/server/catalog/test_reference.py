"""How deltas are named."""

import pytest

from deltaserve.catalog.reference import Reference, parse, parse_name
from deltaserve.errors import InvalidArgument

GOOD = ["a", "0", "acme/sst2", "a.b_c-d/e.f", "a" * 63, f"{'a' * 63}/{'b' * 63}"]
BAD = [
    "",
    "A",
    "a b",
    "a,b",
    "a:b",
    "/a",
    "a/",
    "a/b/c",
    "-a",
    ".a",
    "_a",
    "ä",
    "a" * 64,
    f"a/{'b' * 64}",
    "a\n",
    "a\0",
]


@pytest.mark.parametrize("text", GOOD)
def test_names(text: str) -> None:
    assert parse_name(text) == text and parse(text) == Reference(text)
    assert parse(f"{text}@12") == Reference(text, 12) and str(parse(f"{text}@12")) == f"{text}@12"


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_name(text: str) -> None:
    for wrong in (text, f"{text}@1"):
        with pytest.raises(InvalidArgument) as refused:
            parse(wrong, "deltas[0]")
        assert (refused.value.reason, refused.value.field) == ("BAD_NAME", "deltas[0]")


@pytest.mark.parametrize("number", ["", "0", "01", "-1", "x", "1.0", "1@2", "1" * 10, "²"])
def test_what_is_no_version(number: str) -> None:
    with pytest.raises(InvalidArgument, match="number"):
        parse(f"a@{number}")


def test_a_name_alone_takes_no_version() -> None:
    with pytest.raises(InvalidArgument, match="without a version"):
        parse_name("a@1")
