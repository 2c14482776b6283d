"""The rows that enter the first layer: what was looked up, couplings of it, and soft prompts in their places."""

from collections.abc import Callable

import torch

from deltaserve.backbone.coupling import CouplingTable
from deltaserve.deltas.delta import Delta
from deltaserve.deltas.sites import Axis
from deltaserve.plan import Now, Prompted, PromptPiece, Stack
from deltaserve_kernels.embed import PromptTable, prompt_rows


class Embedded:
    """`module` gives the embedded rows (BERT's embeddings with their norm); None: the input embedding itself does.

    Its forward is ours while some delta acts on what it gives. `factor`: what the input embedding multiplies by.
    """

    def __init__(
        self, module: torch.nn.Module | None, factor: float, now: Now, slots: int, device: torch.device
    ) -> None:
        self.prompts = PromptTable(slots, device)
        self.couplings = CouplingTable(slots, device)
        self._module = module
        self._inner: Callable[..., torch.Tensor] | None = None if module is None else module.forward
        self._factor = factor if module is None else 1.0
        self._now = now
        self._behind: set[int] = set()

    def install(self, slot: int, delta: Delta) -> None:
        """Publishes a delta's soft prompt and coupling, whose tensors are on the device."""
        prompt, coupling = delta.prompt, delta.coupling
        if prompt is not None:
            assert prompt.place is None or self._module is not None, "a soft prompt is placed where nothing is embedded"
            self.prompts.put(slot, (prompt.rows,))
            self._now.prompted[slot] = Prompted(delta.prompt_length, prompt.place or 0)
        if coupling is not None:
            self.couplings.put(slot, coupling)
        if coupling is not None or (prompt is not None and prompt.place is not None):
            self._behind.add(slot)
            self._follow()

    def remove(self, slot: int) -> None:
        """Takes back what a slot has here, if anything."""
        self.prompts.discard(slot)
        self.couplings.discard(slot)
        self._now.prompted.pop(slot, None)
        self._behind.discard(slot)
        self._follow()

    def of(self, looked_up: torch.Tensor, stack: Stack, axis: Axis) -> torch.Tensor:
        """[rows, hidden] of a stack's ids -> [1, rows, hidden] for the model; couplings act on `tokens` rows alone."""
        self._write(looked_up, stack, placed=False)
        if self._module is None and axis is Axis.TOKENS:
            looked_up = self.couplings.coupled(looked_up, self._now.rowmap(axis), self._factor)
        return looked_up.unsqueeze(0)

    def _write(self, rows: torch.Tensor, stack: Stack, placed: bool) -> None:
        pieces = [p for p in stack.prompts if p.placed is placed]
        if pieces:
            prompt_rows(rows, self.prompts, [_piece(p) for p in pieces])

    def _forward(self, *args: object, **known: object) -> torch.Tensor:
        assert self._inner is not None and self._now.plan is not None and self._now.plan.tokens is not None
        given = self._inner(*args, **known)
        if self._behind.isdisjoint(self._now.rowmap(Axis.TOKENS).active):
            return given
        rows = self.couplings.coupled(given.flatten(0, -2), self._now.rowmap(Axis.TOKENS))
        # A dropout gives back what it got, which is not ours to write to.
        rows = rows.clone()
        self._write(rows, self._now.plan.tokens, placed=True)
        return rows.view(given.shape)

    def _follow(self) -> None:
        if self._module is None:
            return
        if self._behind:
            self._module.forward = self._forward
        else:
            self._module.__dict__.pop("forward", None)


def _piece(piece: PromptPiece) -> tuple[int, int, int, int]:
    return piece.slot, piece.row, piece.offset, piece.count
