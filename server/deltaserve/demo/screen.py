"""The demo as a newcomer reads it: what happens, the table, the proof, the memory, what to do next."""

import os
import shutil
import sys
from shlex import quote

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaserve.demo.results import Results
from deltaserve.demo.scenario import Answered, Outcome
from deltaserve_client import DeltaInfo, ServerInfo, Step

_WIDE = 150  # columns from which input, answer and expected stand side by side
_PIPE_COLUMNS = 180


def console() -> Console:
    """Standard output; a pipe gets wide lines instead of folded ones."""
    shown = Console(highlight=False)
    return shown if shown.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)


def opening(to: Console, results: Results) -> None:
    functions, kinds = len(results.backbone.functions), {delta.method for delta in results.deltas}
    to.print(
        f"One backbone, a T5 of {results.backbone.parameters / 1e6:.1f} M parameters, is loaded once and stays frozen. "
        f"It knows {functions} functions of sentences, each announced by an instruction.\n"
        f"{len(results.deltas)} deltas of {len(kinds)} kinds were tuned on it: each does its own task, "
        "without an instruction.\n"
    )
    to.print("Starting a server process, as `deltaserve serve` would ...")


def started(to: Console, address: str, info: ServerInfo) -> None:
    to.print(f"It is up at {address}, on {info.device}, in {info.dtype}. Loading deltas while another client asks it:")


def told(to: Console, outcome: Outcome, results: Results) -> None:
    """All that came of it, in a newcomer's order."""
    traffic(to, outcome)
    table(to, outcome)
    proof(to, outcome)
    memory(to, outcome)
    accuracy(to, results)


def loaded(to: Console, info: DeltaInfo) -> None:
    to.print(f"  {info.name:18} {', '.join(info.kinds):14} {size(info.device_bytes):>10}", style="dim")


def traffic(to: Console, outcome: Outcome) -> None:
    seen = outcome.traffic
    to.print(
        f"{len(outcome.loaded)} deltas hot-loaded in {outcome.load_seconds:.1f} s. A second client kept asking: "
        f"{seen.answered} answers, {seen.while_loading} of them between the first load and the last, "
        f"{len(seen.wrong)} wrong; the slowest took {seen.slowest * 1000:.0f} ms.\n"
    )
    for complaint in seen.wrong[:5]:
        to.print(Text(f"  wrong: {complaint}", style="red"))


def table(to: Console, outcome: Outcome) -> None:
    """One row a request of the batch."""
    wide = to.width >= _WIDE
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("delta", "kind"):
        shown.add_column(heading, no_wrap=True)
    shown.add_column("bytes", justify="right", no_wrap=True)
    for heading in ("input", "answer", "expected") if wide else ("input, answer, expected",):
        shown.add_column(heading, overflow="fold")
    shown.add_column("right", justify="center", no_wrap=True)
    shown.add_column("ms", justify="right", no_wrap=True)
    by_name = {info.name: info for info in outcome.loaded}
    for answered in outcome.answers:
        told = [by_name[name] for name in answered.question.deltas]
        kinds = "\n".join(", ".join(each.kinds) for each in told)
        taken = f"{told[0].device_bytes:,}" if len(told) == 1 else ""
        left = ("\n+ ".join(each.name for each in told), kinds, taken) if told else ("(bare backbone)", "", "")
        mark = Text("yes", "green") if answered.right else Text("NO", "bold red")
        shown.add_row(*left, *_said(answered, wide), mark, f"{answered.seconds * 1000:.0f}")
    to.print(
        f"One batch: {len(outcome.answers)} requests at once, each for another delta, for several together, or for the "
        "bare backbone. Those that stand together were never tuned together.\n"
    )
    to.print(shown)
    to.print()


def _said(answered: Answered, wide: bool) -> tuple[Text, ...]:
    texts = (answered.question.input, answered.answer, answered.question.expected)
    if wide:
        return tuple(map(Text, texts))
    marks = ("  ", "> ", "= ")
    return (Text("\n".join(mark + text for mark, text in zip(marks, texts, strict=True))),)


def proof(to: Console, outcome: Outcome) -> None:
    """From the engine's own record of its forwards."""
    alone = sum(answered.output_tokens for answered in outcome.answers)
    to.print(
        f"{len(outcome.forwards)} forwards served these {len(outcome.answers)} requests, by the engine's own record. "
        f"One after the other they would have taken {alone} (a forward for each token)."
    )
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("forward", "requests in it", "rows", "distinct deltas", "distinct kinds", "ms"):
        shown.add_column(heading, justify="right")
    shown.add_column("kinds")
    for step in outcome.forwards:
        numbers = (step.index, step.sequences, step.rows, len(step.deltas), len(step.kinds))
        shown.add_row(*map(str, numbers), f"{step.duration * 1000:.1f}", ", ".join(step.kinds))
    to.print(shown)
    to.print(f"The widest forward held {_held(outcome.widest)}.\n", style="bold")


def _held(step: Step) -> str:
    return f"{step.sequences} requests for {len(step.deltas)} different deltas of {len(step.kinds)} kinds"


def memory(to: Console, outcome: Outcome) -> None:
    held, deltas = outcome.info.memory, sum(info.device_bytes for info in outcome.loaded)
    copies = held.backbone_bytes * len(outcome.loaded)
    together, count = held.backbone_bytes + deltas, len(outcome.loaded)
    to.print(
        f"Memory on {outcome.info.device}: one backbone of {size(held.backbone_bytes)} and {count} deltas of together "
        f"{size(deltas)} take {size(together)}.\n"
        f"{count} fully fine-tuned copies would take {size(copies)}, {copies / together:.1f} times as much.\n"
    )


def accuracy(to: Console, results: Results) -> None:
    worst = min(results.deltas, key=lambda delta: delta.delta.exact_match)
    best = max(delta.delta.exact_match for delta in results.deltas)
    full = f"; full fine-tuning: {worst.full.exact_match:.1%}" if worst.full else ""
    bare = max(delta.backbone_exact_match for delta in results.deltas)
    to.print(
        "The sentences were held out of training, and are among those that are answered right. Over "
        f"{results.held_out} such sentences a task, the deltas\n"
        f"are right in {worst.delta.exact_match:.1%} ({worst.name}{full}) to "
        f"{best:.1%}, the bare backbone without an instruction in {bare:.1%} at most.\n"
    )
    if results.combinations:
        together = [one.exact_match for one in results.combinations]
        to.print(
            f"Deltas together on a request do both tasks, or all three, in {min(together):.1%} to {max(together):.1%}: "
            "as `deltas: \\[a, b]`, by name, without any training.\n"
        )


def onwards(to: Console, address: str, outcome: Outcome, keep: bool) -> None:
    """Three commands to paste."""
    answered = next(each for each in outcome.answers if each.question.deltas)
    program, asked = _program(), quote(answered.question.input)
    if keep:
        to.print(f"The server stays at {address} until Ctrl-C. In another terminal:")
        commands = (
            f"generate {asked} --delta {answered.question.deltas[0]} --address {address}",
            f"generate {asked} --delta {outcome.loaded[-1].name} --address {address}",
            f"deltas ls --address {address}",
        )
    else:
        to.print("To go on, let a server stay, and ask it from another terminal:")
        commands = (
            "demo --keep --port 9000",
            f"generate {asked} --delta {answered.question.deltas[0]}",
            "deltas ls",
        )
    to.print(Text("\n".join(f"  {program} {command}" for command in commands) + "\n"), soft_wrap=True)


def verdict(to: Console, outcome: Outcome, ended: int | None, seconds: float) -> None:
    right = sum(answered.right for answered in outcome.answers)
    good = outcome.right and ended == 0
    how = "cleanly" if ended == 0 else "only when killed" if ended is None else f"with status {ended}"
    to.print(
        Text(
            f"{right} of {len(outcome.answers)} answers are right; the server ended {how}; {seconds:.1f} s in all.",
            "bold green" if good else "bold red",
        )
    )


def _program() -> str:
    """How this installation's command is called from here."""
    return "deltaserve" if shutil.which("deltaserve") else f"{os.path.relpath(sys.executable)} -m deltaserve"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
