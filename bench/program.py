"""The commands of `python -m bench`."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import copies as full_copies
from bench import gpu as on_gpu
from bench import micro as forward_costs
from bench import mixed as kind_costs
from bench import report as results
from bench import roofline, screen
from bench.origin import ROOT, origin
from bench.quiet import wait_for_quiet
from bench.rows import Row, write
from deltaserve.app.machine import free_memory

RESULTS = ROOT / "bench" / "results"

app = typer.Typer(
    help="Measurements. Rows go to JSON lines, medians and ratios to the screen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 120)

_LORAS = "one forward of 8 requests ÷ transformers' own, medians of rounds"
_KINDS = "one forward of 32 requests for 16 deltas ÷ the bare backbone's on as many rows, medians of rounds"
_COPIES = "requests of several tasks in a closed loop ÷ deltaserve's time for the same, medians of rounds"

Quick = Annotated[bool, typer.Option("--quick", help="Fewer rounds.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Tiny backbones: to try the bench out, not for figures.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.", show_default="torch's own")]
Seed = Annotated[int, typer.Option(help="Of weights, inputs and orders.")]

Wait = Annotated[float, typer.Option(min=0, help="Minutes that a case waits at most until others are idle.")]
Only = Annotated[str, typer.Option(help="Cases whose name has this in it; the others' rows stay.")]


@app.command()
def micro(
    out: Annotated[Path, typer.Option(help="File for the rows.")] = RESULTS / "micro.jsonl",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:n.")] = "cpu",
    quick: Quick = False,
    tiny: Tiny = False,
    wait: Wait = 0,
    threads: Threads = None,
    seed: Seed = 0,
    only: Only = "",
    model: Annotated[bool, typer.Option("--model", help="Only count bytes, operations and limits.")] = False,
) -> None:
    """The cost of a packed forward: bare, with deltas that no row uses, with a LoRA for each request; of each kind."""
    if model:
        console.print(roofline.table_of_primitives())
        console.print(roofline.table_of_limits())
        return
    place = _start(device, threads)
    of_loras = [case for case in forward_costs.cases(place, quick=quick, tiny=tiny) if only in str(case)]
    of_kinds = [case for case in kind_costs.cases(quick=quick, tiny=tiny) if only in str(case)]
    work: list[tuple[str, int, Callable[[Callable[[], object]], list[Row]]]] = [
        *((str(c), c.rounds * forward_costs.VARIANTS, partial(forward_costs.run, c, place, seed)) for c in of_loras),
        *((str(c), c.rounds * kind_costs.VARIANTS, partial(kind_costs.run, c, place, seed)) for c in of_kinds),
    ]
    if not work:
        raise typer.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
    rows: list[Row] = []
    with screen.progress(console) as bar:
        for case, total, measure in work:
            if wait:
                wait_for_quiet(wait * 60)
            task = bar.add_task(case, total=total)
            rows += measure(partial(bar.advance, task))
            if not console.is_terminal:
                console.print(f"done: {case}; others kept {rows[-1].others:.2f} cores busy")
    write(out, rows, origin(seed, place), keep=bool(only))
    split = sum(row.name.startswith("micro.") for row in rows)
    for own, keys, title in ((rows[:split], forward_costs.KEYS, _LORAS), (rows[split:], kind_costs.KEYS, _KINDS)):
        if own:
            console.print(screen.times(own, keys, title))
    console.print(f"{len(rows)} rows in {out}")
    raise typer.Exit(any(row.outcome == "wrong" for row in rows))


@app.command()
def copies(
    out: Annotated[Path, typer.Option(help="File for the rows.")] = RESULTS / "copies.jsonl",
    quick: Annotated[bool, typer.Option("--quick", help="A telling part, in some three minutes.")] = False,
    tiny: Tiny = False,
    wait: Wait = 0,
    threads: Threads = None,
    seed: Seed = 0,
    only: Only = "",
    room: Annotated[int | None, typer.Option(help="Bytes for copies.", show_default="60 % of free memory")] = None,
) -> None:
    """The same tasks by one deltaserve, by a full fine-tuned copy each, by one copy that swaps weights, by PEFT."""
    place = _start("cpu", threads)
    room = int(full_copies.SHARE * free_memory()) if room is None else room
    work = [case for case in full_copies.cases(room, quick=quick, tiny=tiny) if only in str(case)]
    if not work:
        raise typer.BadParameter(f"no case has {only!r} in its name", param_hint="--only")
    rows: list[Row] = []
    with screen.progress(console) as bar:
        for case in work:
            if wait:
                wait_for_quiet(wait * 60)
            task = bar.add_task(str(case), total=case.rounds * len(full_copies.variants(case)))
            rows += full_copies.run(case, room, seed, partial(bar.advance, task))
            write(out, rows, origin(seed, place), keep=bool(only))
            if not console.is_terminal:
                console.print(f"done: {case}; others kept {rows[-1].others:.2f} cores busy")
    console.print(screen.times(rows, full_copies.KEYS, _COPIES))
    console.print(f"{len(rows)} rows in {out}")
    raise typer.Exit(any(row.outcome == "wrong" for row in rows))


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for the rows.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:n; cpu tries this command out, in an interpreter.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Nothing is begun after this time.")] = 7.0,
    tiny: Tiny = False,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """All that needs a GPU in one go: are kernels and engine right there, and how fast, beside what is possible.

    Exits with 2 without one, unless --tiny, which then runs on the CPU: to try this out, not for figures.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        if not tiny:
            console.print("no GPU that torch can use: nothing was run (--tiny tries this command out)")
            raise typer.Exit(2)
        device = "cpu"
    place = _start(device, threads)
    rows: list[Row] = []
    for row in on_gpu.run(place, seed, minutes * 60, tiny=tiny):
        told = "" if row.error_ratio is None else f" {row.error_ratio:.1e}"
        console.print(f"{row.name} {' '.join(map(str, row.parameters.values()))}: {row.outcome}{told} {row.note}")
        rows.append(row)
        write(out / "gpu.jsonl", rows, origin(seed, place))
    on_gpu.show(console, rows)
    console.print(f"{len(rows)} rows in {out / 'gpu.jsonl'}, on {origin(seed, place).device}")
    raise typer.Exit(any(row.outcome == "wrong" for row in rows))


@app.command()
def aot(
    out: Annotated[Path, typer.Option(help="File for the table.")] = RESULTS / "aot.json",
    chips: Annotated[str, typer.Option(help="Which GPUs, with commas between.")] = "sm_80,sm_90,sm_100,gfx942",
) -> None:
    """Compiles every kernel that a launch may choose; no GPU is needed. Exits with 1 where one is not right."""
    # They import Triton, which there is for Linux alone.
    from bench import aot as ahead
    from deltaserve_kernels.gpu.variants import variants

    wanted = [name.strip() for name in chips.split(",")]
    unknown = [name for name in wanted if name not in ahead.CHIPS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(ahead.CHIPS)}", param_hint="--chips")
    found = []
    with screen.progress(console) as bar:
        for chip in wanted:
            for kernel in bar.track(list(variants(chip)), description=chip):
                found.append(ahead.compiled(ahead.CHIPS[chip], kernel))
    made = origin(0, torch.device("cpu"))
    ahead.write(out, found, {"commit": made.commit, "date": made.date})
    console.print(ahead.table(found))
    wrong = [one for one in found if one.objection]
    console.print(f"{len(found)} kernels compiled, {len(wrong)} not as they should be; table in {out}")
    raise typer.Exit(bool(wrong))


@app.command()
def tune(
    out: Annotated[Path | None, typer.Option(help="File for the table; left out, the package's own.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:n; cpu tries this command out, in an interpreter.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Nothing is tried after this time.")] = 5.0,
    tiny: Tiny = False,
    seed: Seed = 0,
) -> None:
    """Which tiles each kernel takes on this chip: neighbours of those it takes are tried until none is faster."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        if not tiny:
            console.print("no GPU that torch can use: nothing was tuned (--tiny tries this command out)")
            raise typer.Exit(2)
        device = "cpu"
    if device == "cpu" and out is None:
        raise typer.BadParameter("what an interpreter finds is no table for the package", param_hint="--out")
    from bench import tune as tuning

    place = _start(device, None)
    torch.manual_seed(seed)
    tables = tuning.tuned(place, time.monotonic() + minutes * 60, tiny=tiny, say=console.print)
    file = out or tuning.PACKAGED
    file.write_text(tuning.written(tables))
    console.print(
        f"tiles of {tuning.architecture(place)} in {file}; python -m bench aot says whether others compile them"
    )


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="Rows of micro, or of copies.")] = RESULTS / "micro.jsonl",
    readme: Annotated[bool, typer.Option("--readme", help="Put them into the README.")] = False,
) -> None:
    """Results as the Markdown that the README quotes."""
    if readme:
        results.quote(ROOT / "README.md", file)
    else:
        print(results.table(file))


def _start(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device(device)
