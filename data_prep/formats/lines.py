"""Lines of plain or compressed files, and JSON in them. Lines end at b"\\n" alone: text holds U+2028 and its like."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.formats.compression import Damaged, codec_of, codec_of_bytes, inflate
from data_prep.formats.files import File, Options, byte_ranges, open_file, pieces
from data_prep.formats.long_json import parse_long_object, short_parts
from data_prep.long_text import LONG, Spilled
from data_prep.memory import HELD, Apart, check_size
from data_prep.sources.base import Fault, Report, Unit

try:
    import orjson
except ImportError:  # the `data` extra brings it; the standard library gives the same documents, more slowly
    orjson = None  # type: ignore[assignment]

_PIECE = 1 << 20
LONGEST_LINE = 1 << 30
"""Bytes; a longer line is not held in memory but reported. Files that are no line files look like this."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    number: int | None
    """From 1; unknown in a range that begins inside a file."""
    offset: int
    """Of its first byte in the file, uncompressed."""
    data: bytes
    spilled: Spilled | None = None
    """The bytes, when they are too many to be held; `data` is b"" then. Gone when the next line is asked for."""

    @property
    def where(self) -> str:
        return f"byte {self.offset}" if self.number is None else f"line {self.number}, byte {self.offset}"


def split_lines_file(file: File, target_bytes: int, options: Options) -> list[Unit]:
    """Byte ranges of a plain file; a compressed one, whatever its name says, is one unit."""
    if codec_of(file.path) is not None or file.size <= target_bytes:
        return [file.unit()]
    with open_file(file.path, options) as stream:
        head = stream.read(8)
    return [file.unit()] if codec_of_bytes(head) else byte_ranges(file, target_bytes)


def read_lines(
    unit: Unit, report: Report, options: Options, scratch: Path | None = None, memory: int | None = None
) -> Iterator[Line]:
    """The lines that begin in the unit, without their ends. Damage is reported after the last whole line.

    `scratch`: where long lines are kept; None: in memory. `memory`: what a conversation may take of it; None: anything.
    """
    with open_file(unit.path, options) as stream:
        if unit.start > 0:
            # From the byte before: a line that begins exactly at the start is this unit's.
            stream.seek(unit.start - 1)
            yield from cut(unit, pieces(stream, _PIECE), report, unit.start - 1, scratch, memory)
            return
        head = stream.read(8)
        stream.seek(0)
        codec, promised = codec_of_bytes(head), codec_of(unit.path)
        if codec is None and promised is not None and (not head or not _is_text(head)):
            reason = "the file is empty" if not head else f"no {promised} data, as its name promises"
            report(Fault(unit.path, "byte 0", reason, ends_unit=True))
            return
        content = pieces(stream, _PIECE) if codec is None else inflate(stream, codec)
        yield from cut(unit, content, report, scratch=scratch, memory=memory)


def _is_text(head: bytes) -> bool:
    """A download tool may have inflated the file and kept its name."""
    return head.lstrip(_BOM).lstrip()[:1] in (b"{", b"[")


class _Begun:
    """A line whose end has not come yet."""

    def __init__(self, scratch: Path | None, memory: int | None) -> None:
        self._scratch = scratch
        self._longest = LONGEST_LINE if memory is None else min(LONGEST_LINE, memory // HELD)
        self._memory = memory
        self._pieces: list[bytes] = []
        self._spilled: Spilled | None = None
        self.size = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self._longest:
            self.clear()
        elif self._spilled is not None:
            self._spilled.write(piece)
        elif self.size > LONG and self._scratch is not None:
            self._spilled = Spilled(self._scratch)
            for each in (*self._pieces, piece):
                self._spilled.write(each)
            self._pieces = []
        else:
            self._pieces.append(piece)

    def check(self) -> None:
        """Raises ValueError for a line that was not kept."""
        if self.size > LONGEST_LINE:
            raise ValueError(f"a line of {self.size:,} bytes")
        if self.size > self._longest and self._memory is not None:
            check_size("a line", self.size, HELD, self._memory)

    def line(self, number: int, at: int, unit: Unit) -> Line:
        return Line(number if unit.start == 0 else None, at, b"".join(self._pieces), self._spilled)

    def clear(self) -> None:
        self._pieces = []
        if self._spilled is not None:
            self._spilled.close()
            self._spilled = None


def cut(
    unit: Unit,
    content: Iterable[bytes],
    report: Report,
    at: int = 0,
    scratch: Path | None = None,
    memory: int | None = None,
) -> Iterator[Line]:
    """Lines that begin in the unit, of a stream that comes in pieces and begins at byte `at`.

    The rest after a cut is reported, not given.
    """
    stop = math.inf if unit.stop is None else unit.stop
    number, begun = 1, _Begun(scratch, memory)
    try:
        for piece in content:
            first, *lines = piece.split(b"\n")
            begun.add(first)
            if not lines:
                continue
            if at >= unit.start and _is_kept(begun, unit.path, at, report):
                yield begun.line(number, at, unit)
            number, at = number + 1, at + begun.size + 1
            begun.clear()
            last = lines.pop()
            for data in lines:
                if at >= stop:
                    return
                if at >= unit.start:
                    yield Line(number if unit.start == 0 else None, at, data)
                number, at = number + 1, at + len(data) + 1
            if at >= stop:
                return
            begun = _Begun(scratch, memory)
            begun.add(last)
        if begun.size and at >= unit.start and _is_kept(begun, unit.path, at, report):
            yield begun.line(number, at, unit)
    except Damaged as damage:
        line = f"line {number}, " if unit.start == 0 else ""
        place = f"{line}byte {at} of the content (byte {damage.at} of the file)"
        report(Fault(unit.path, place, damage.reason, ends_unit=True))
    finally:
        begun.clear()


def _is_kept(line: _Begun, path: str, at: int, report: Report) -> bool:
    try:
        line.check()
    except ValueError as error:
        report(Fault(path, f"byte {at}", str(error)))
        return False
    return True


def row_of(line: Line, apart: Apart | None = None) -> dict[str, Any] | None:
    """`parse_object` of a line; of one that is not held in memory the text is `apart`, a LongText."""
    if line.spilled is None:
        return parse_object(line.data)
    assert apart is not None
    return parse_long_object(line.spilled, apart, parse_value, parse_object)


def fields_of(line: Line) -> dict[str, Any] | None:
    """The object of a line, or only what fields it has and of what kind: a long string may be another one.

    Raises ValueError saying what is wrong with it.
    """
    return parse_object(line.data) if line.spilled is None else short_parts(line.spilled, parse_object)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for an empty line. Raises ValueError saying what is wrong with it."""
    found = parse_value(data)
    if isinstance(found, dict):
        return found
    if found is None and not data.strip():
        return None
    raise ValueError(f"a JSON {'array' if isinstance(found, list) else type(found).__name__}, not an object")


def parse_value(data: bytes) -> Any:
    """Any JSON value; None for nothing. Raises ValueError saying what is wrong with it."""
    if orjson is None:
        return _loads_slowly(data)
    try:
        return orjson.loads(data)
    except ValueError:
        return _loads_slowly(data)


def _loads_slowly(data: bytes) -> Any:
    """Says exactly what is wrong, and takes what orjson does not: NaN, an empty line, a byte order mark."""
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line: {error.reason}") from error
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
