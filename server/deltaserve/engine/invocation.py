"""Where a delta with an invocation begins to act (activated LoRA, arXiv 2504.12397). No torch here."""

from collections.abc import Sequence


def last_start(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where the last occurrence of `wanted`, which is not empty, starts in `ids`; None where there is none.

    Knuth, Morris and Pratt's search from the end: the time is linear in both lengths, whatever a tenant chose.
    """
    sought = wanted[::-1]
    # borders[i]: length of the longest proper part of sought[: i + 1] that it both begins and ends with.
    borders = [0]
    held = 0
    for token in sought[1:]:
        while held and token != sought[held]:
            held = borders[held - 1]
        held += token == sought[held]
        borders.append(held)
    held = 0
    for at in range(len(ids) - 1, -1, -1):
        while held and ids[at] != sought[held]:
            held = borders[held - 1]
        held += ids[at] == sought[held]
        if held == len(sought):
            return at
    return None
