"""A JSON object that is too long to be held in memory: one string of it, the text, goes to a file, piece by piece.

The strings that are long are cut out, and what is left, which is short, is parsed by the usual parser with a mark in
the place of each. A long string is then decoded in pieces by the same parser, cut where no escape and no character is
cut. So the same lines are taken, with the same content, and the same ones are refused.
"""

import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from data_prep.long_text import LONG, LongText, Mapped, Spilled, long_text
from data_prep.memory import HELD, Apart, check_size

_PIECE = 1 << 20
_LONG_STRING = LONG // 4
"""Bytes of a string, as spelled, that is cut out."""
_STRETCH = 1 << 22
_LONGEST_ESCAPE = 6
"""Bytes of \\uXXXX."""
_BESIDE = "what the line holds beside its text"
_HIGH_HALF = re.compile(rb"\\u[dD][89abAB]")
"""Of a surrogate pair."""

Parse = Callable[[bytes], Any]


def short_parts(line: Spilled, parse_row: Parse) -> dict[str, Any] | None:
    """The object of a line with something else in the place of each long string; to see what fields there are."""
    with line.mapped() as mapped:
        return parse_row(b"".join(_short_parts(mapped, {})))


@contextmanager
def kept_while_used(row: Mapping[str, Any], apart: Apart | None) -> Iterator[None]:
    """The row's text that is apart, if it has one, is gone afterwards."""
    text = None if apart is None or apart.column is None else row.get(apart.column)
    try:
        yield
    finally:
        if isinstance(text, LongText):
            text.close()


def parse_long_object(line: Spilled, apart: Apart, parse: Parse, parse_row: Parse) -> dict[str, Any] | None:
    """The object of a line, with a LongText for its text when that is long. None for an empty line.

    `parse`: of any JSON value, `parse_row`: of an object. Raises ValueError saying what is wrong with the line.
    """
    with line.mapped() as mapped:
        marks: dict[str, tuple[int, int]] = {}
        short = b"".join(_short_parts(mapped, marks))
        check_size(_BESIDE, len(short), HELD, apart.memory)
        row = parse_row(short)
        if row is None:
            return None
        text = None if apart.column is None else row.get(apart.column)
        chosen = marks.pop(text, None) if isinstance(text, str) else None
        check_size(_BESIDE, sum(end - start for start, end in marks.values()), HELD, apart.memory)
        others = {mark: "".join(_decoded(mapped, *place, parse)) for mark, place in marks.items()}
        row = _put_back(row, others) if others else row
        if chosen is None:
            return row
        assert apart.column is not None
        row[apart.column] = long_text((piece.encode() for piece in _decoded(mapped, *chosen, parse)), apart.folder)
        return row


def _short_parts(mapped: Mapped, marks: dict[str, tuple[int, int]]) -> Iterator[bytes]:
    """The line without its long strings: `marks` gets what stands for each, with the range of its content."""
    content = mapped.bytes
    salt = uuid.uuid4().hex
    quotes = _quotes(mapped)
    kept = 0
    for start in quotes:
        end = next((quote for quote in quotes if _backslashes(content, quote, start + 1) % 2 == 0), None)
        if end is None:
            raise ValueError(f"not JSON: a string that begins at byte {start} of the line has no end")
        if end - start > _LONG_STRING:
            mark = f"{salt}-{len(marks)}"
            marks[mark] = (start + 1, end)
            yield content[kept : start + 1]
            yield mark.encode()
            kept = end
    yield content[kept:]


def _quotes(mapped: Mapped) -> Iterator[int]:
    """Places of all quotes."""
    for begin in range(0, len(mapped.bytes), _STRETCH):
        at, stop = begin, begin + _STRETCH
        while (at := mapped.bytes.find(b'"', at, stop)) >= 0:
            yield at
            at += 1
        mapped.forget(begin)


def _backslashes(content: Any, end: int, start: int) -> int:
    """How many stand directly before `end`, from `start` on."""
    at = end
    while at > start and content[at - 1] == 0x5C:
        at -= 1
    return end - at


def _decoded(mapped: Mapped, start: int, stop: int, parse: Parse) -> Iterator[str]:
    """The string spelled in [start, stop), in pieces."""
    while start < stop:
        piece = mapped.bytes[start : min(start + _PIECE, stop)]
        if start + len(piece) < stop:
            piece = piece[: _cut(piece)]
        try:
            yield str(parse(b'"' + piece + b'"'))
        except ValueError as error:
            raise ValueError(f"{error} (counted from byte {start - 1} of the line)") from error
        start += len(piece)
        mapped.forget(start)


def _cut(piece: bytes) -> int:
    """The last place in a piece of a string where it can be cut; the piece does not begin inside an escape.

    Not inside an escape or between the two of a surrogate pair; not inside a character.
    """
    end = len(piece)
    last = piece.rfind(b"\\", end - 2 * _LONGEST_ESCAPE)
    if last >= 0 and _backslashes(piece, last + 1, 0) % 2 == 1:
        # Whether the last escape is whole need not be known; it may be the low half of a pair.
        high = last - _LONGEST_ESCAPE
        if high >= 0 and _HIGH_HALF.match(piece, high) and _backslashes(piece, high + 1, 0) % 2 == 1:
            return high
        return last
    for back in range(1, 4):
        byte = piece[end - back]
        if byte & 0xC0 != 0x80:
            wanted = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end - back if wanted > back else end
    return end


def _put_back(value: Any, strings: dict[str, str]) -> Any:
    if isinstance(value, str):
        return strings.get(value, value)
    if isinstance(value, list):
        return [_put_back(item, strings) for item in value]
    if isinstance(value, dict):
        return {_put_back(name, strings): _put_back(item, strings) for name, item in value.items()}
    return value
