"""Where a delta may be read from: below --delta-root, and nowhere else for those who call."""

from pathlib import Path, PurePosixPath

from deltaserve.errors import FailedPrecondition, InvalidArgument

_LONGEST = 4096


def below(root: Path | None, given: str) -> Path:
    """The folder that a caller's `source` means. Touches the disk.

    Raises InvalidArgument for a path that is absolute, has `..`, or leads out of the root by a symlink, its files
    included; FailedPrecondition where the server has no root.
    """
    if root is None:
        raise FailedPrecondition(
            "this server was started without --delta-root, so it loads no deltas while it runs; start it with "
            "--delta-root DIR",
            reason="NO_DELTA_ROOT",
        )
    path = PurePosixPath(given)
    if not given or len(given) > _LONGEST or "\0" in given or "\\" in given:
        raise _bad("is not a path: give the checkpoint's folder, relative to --delta-root", given)
    if path.is_absolute() or ".." in path.parts:
        raise _bad("is absolute or has `..`; give it relative to --delta-root", given)
    top = root.resolve()
    try:
        folder = (top / path).resolve()
        _inside(folder, top, given)
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.is_file():  # folders in it are nobody's checkpoint
                _inside(file.resolve(), top, given)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        why = getattr(error, "strerror", None) or "its links go round in a circle"
        raise _bad(f"cannot be read: {why}", given) from error
    return folder


def at_start(root: Path | None, given: str) -> Path:
    """The folder that an operator's `--delta name=path` means: tried under --delta-root, then as it is."""
    path = Path(given).expanduser()
    if root is not None and not path.is_absolute() and (root / path).exists():
        path = root / path
    return path.resolve()


def shown(root: Path | None, folder: Path) -> str:
    """A folder as answers name it: relative to the root where it is below it."""
    top = None if root is None else root.resolve()
    return str(folder.relative_to(top)) if top is not None and folder.is_relative_to(top) else str(folder)


def _inside(path: Path, top: Path, given: str) -> None:
    if not path.is_relative_to(top):
        raise _bad("leads out of --delta-root by a symlink", given)


def _bad(what: str, given: str) -> InvalidArgument:
    return InvalidArgument(f"source {given[:200]!r} {what}", reason="BAD_SOURCE", field="source")
