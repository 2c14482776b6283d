"""The README's code does what it says: Python blocks run against a server, commands and flags exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
DEFAULT_ADDRESS = re.compile(r"\b(?:127\.0\.0\.1|localhost):9000\b")


def blocks(*languages: str) -> list[tuple[int, str]]:
    """Line and text of each fenced block in one of `languages`."""
    text = README.read_text() if README.is_file() else ""
    found = [(text.count("\n", 0, m.start()) + 1, m) for m in FENCE.finditer(text)]
    return [(line, m.group(2)) for line, m in found if m.group(1) in languages]


def commands() -> list[tuple[int, list[str]]]:
    """Line and words of each command: lines after `$ ` in console blocks, all lines of bash blocks."""
    prompted = [
        (line + offset, text.removeprefix("$ "))
        for line, block in blocks("console")
        for offset, text in enumerate(block.replace("\\\n", "").splitlines(), 1)
        if text.startswith("$ ")
    ]
    plain = [
        (line + offset, text)
        for line, block in blocks("bash", "sh")
        for offset, text in enumerate(block.replace("\\\n", "").splitlines(), 1)
    ]
    return [(line, words) for line, text in prompted + plain if (words := shlex.split(text, comments=True))]


def of(program: str, *subcommands: str) -> list[object]:
    """The words after `program`; only those of `subcommands`, if any are given."""
    return [
        pytest.param(words[1:], id=f"line {line}")
        for line, words in commands()
        if words[0] == program and (not subcommands or words[1] in subcommands)
    ]


def test_there_is_a_readme() -> None:
    assert README.is_file()
    assert blocks("python")
    assert {"demo", "test"} <= {words[1] for _, words in commands() if words[0] == "make"}


def test_what_is_served_is_what_the_readme_says(root: Path) -> None:
    from deltaserve.backbone.families import FAMILIES
    from deltaserve.formats.peft.types import TYPES
    from deltaserve.formats.registry import KINDS

    def plain(text: str) -> str:
        return re.sub("[-_]", "", text.casefold().replace("³", "3"))

    ours, table = README.read_text(), (root / "server" / "deltaserve" / "formats" / "README.md").read_text()
    assert [family.name for family in FAMILIES if plain(family.name) not in plain(ours)] == []
    assert [kind for kind in KINDS if plain(kind) not in plain(ours + table)] == []
    assert f"{len(TYPES)} of PEFT's" in ours


@pytest.mark.parametrize("code", [pytest.param(code, id=f"line {line}") for line, code in blocks("python")])
def test_python(code: str, readme_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`readme_server` is the address of a running server that has the deltas which the README names.

    What the code prints is what the block after it shows.
    """
    exec(compile(DEFAULT_ADDRESS.sub(readme_server, code), str(README), "exec"), {"__name__": "__main__"})
    text = README.read_text()
    after = FENCE.search(text, text.index(code) + len(code) + len("```"))
    assert after is not None
    assert (after.group(1), capsys.readouterr().out.strip()) == ("text", after.group(2).strip())


@pytest.mark.parametrize("words", of("deltaserve", "generate", "deltas", "info"))
def test_request(words: list[str], readme_server: str, tmp_path: Path) -> None:
    """Commands that ask a server are run."""
    done = subprocess.run(
        [sys.executable, "-m", "deltaserve", *words],
        cwd=tmp_path,
        env={"DELTASERVE_ADDRESS": readme_server, "COLUMNS": "200", "NO_COLOR": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize("words", of("make"))
def test_make(words: list[str], root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets


@pytest.mark.parametrize("words", of("deltaserve"))
def test_deltaserve(words: list[str], tmp_path: Path) -> None:
    """The command exists and its help names every flag; it is not run."""
    path = words[: next((place for place, word in enumerate(words) if not word.isalpha()), len(words))]
    while path:
        shown = subprocess.run(
            [sys.executable, "-m", "deltaserve", *path, "--help"],
            cwd=tmp_path,
            env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if shown.returncode == 0:
            break
        path.pop()  # what looked like a subcommand was an argument
    assert path, f"no such command: {words}"
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert {flag for flag in flags if flag not in shown.stdout} == set()
