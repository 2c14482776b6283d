"""`python -m bench`, from the repository's root."""

from deltaserve.cli.waiting import spin_briefly


def main() -> None:
    """The waiting of threads is that of `deltaserve serve`, and told before torch is imported."""
    spin_briefly()
    from bench.program import app

    app(prog_name="python -m bench")


main()
