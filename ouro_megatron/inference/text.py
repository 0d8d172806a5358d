"""From tokens to text that may be shown: whole characters, and nothing that could still become a stop text."""

from collections.abc import Sequence

from ouro_megatron.data.tokenizer import TextTokenizer

_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character: more tokens than that without one are broken bytes, shown as U+FFFD."""


class TextPieces:
    """What each token adds to the text; a character of several tokens appears with its last one."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        """Tokens shown last: a tokenizer may decode a token otherwise at the start of a text."""
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is whole now."""
        self._pending.append(token)
        piece = self._piece()
        if piece.endswith(_UNFINISHED) and len(self._pending) < _LONGEST_CHARACTER:
            return ""
        self._settle()
        return piece

    def finish(self) -> str:
        """What was pending: an unfinished character becomes U+FFFD."""
        piece = self._piece() if self._pending else ""
        self._settle()
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode([*self._context, *self._pending])[len(before) :]

    def _settle(self) -> None:
        self._context = self._pending[-_LONGEST_CHARACTER:]
        self._pending = []


class StopText:
    """Holds text back while its end may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop text is complete). After a stop nothing more comes."""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back, when no stop text came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
