"""`deltaserve` and `python -m deltaserve`."""

import sys


def main() -> None:
    """Runs the command line; ends with SystemExit, whose code is what `deltaserve --help` says."""
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        print("the command line is not installed: pip install 'deltaserve[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from deltaserve.cli.program import run

    run()


if __name__ == "__main__":
    main()
