"""Text that grows with its tokens: whole characters only, with the spaces it has in the whole text."""

from collections.abc import Sequence

from deltaserve.service.text import Text

_BROKEN = "\ufffd"
_LONGEST_WAIT = 64
"""Tokens without a whole character after which the text is taken as it is."""


class Detokenizer:
    """Decodes a window of the last tokens; what is beyond the window's known text is new.

    The window begins with tokens that have text, because a tokenizer treats the space before a text's first word in
    its own way. A trailing U+FFFD may be a character whose last bytes are to come, and is held back.
    `context`: tokens that come before, whose text is not repeated.
    """

    def __init__(self, text: Text, context: Sequence[int] = ()) -> None:
        self._text = text
        self._window = list(context)
        self._read = len(self._window)
        self._told = len(text.decode(self._window)) if self._window else 0

    def feed(self, token: int) -> str:
        """Text that this token completes."""
        if not self._text.there:
            return ""
        self._window.append(token)
        whole = self._text.decode(self._window)
        sure = whole.rstrip(_BROKEN) if len(self._window) - self._read < _LONGEST_WAIT else whole
        new = sure[self._told :]
        if not new:
            return ""
        self._told += len(new)
        if len(sure) == len(whole):
            del self._window[: self._read]
            self._read = len(self._window)
            self._told = len(self._text.decode(self._window))
        return new

    def end(self) -> str:
        """What was held back."""
        rest = self._text.decode(self._window)[self._told :] if self._window else ""
        self._told += len(rest)
        return rest


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces; holds back what could be the start of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str, may_stop: bool = True) -> str:
        """Text that is surely before any stop string. `found` is set once there is one; nothing comes after it."""
        assert self.found is None
        self._held += piece
        if may_stop:
            places = [(at, s) for s in self._strings if (at := self._held.find(s)) >= 0]
            if places:
                at, self.found = min(places, key=lambda place: (place[0], -len(place[1])))
                sure, self._held = self._held[:at], ""
                return sure
        keep = max((self._overlap(s) for s in self._strings), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def end(self) -> str:
        """What was held back: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, string: str) -> int:
        """Length of the longest end of the held text that begins `string` without being all of it."""
        for length in range(min(len(string) - 1, len(self._held)), 0, -1):
            if self._held.endswith(string[:length]):
                return length
        return 0
