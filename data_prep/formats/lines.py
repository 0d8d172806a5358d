"""Lines of plain or compressed files, and JSON in them. Lines end at b"\\n" alone: text holds U+2028 and its like."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_prep.formats.compression import Damaged, codec_of, codec_of_bytes, inflate
from data_prep.formats.files import File, Options, byte_ranges, open_file, pieces
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


def read_lines(unit: Unit, report: Report, options: Options) -> Iterator[Line]:
    """The lines that begin in the unit, without their ends. Damage is reported after the last whole line."""
    with open_file(unit.path, options) as stream:
        if unit.start > 0:
            yield from _range(stream, unit, report)
            return
        head = stream.read(8)
        stream.seek(0)
        codec, promised = codec_of_bytes(head), codec_of(unit.path)
        if codec is None and promised is not None and (not head or not _is_text(head)):
            reason = "the file is empty" if not head else f"no {promised} data, as its name promises"
            report(Fault(unit.path, "byte 0", reason, ends_unit=True))
            return
        content = pieces(stream, _PIECE) if codec is None else inflate(stream, codec)
        for line in cut(unit.path, content, report):
            if unit.stop is not None and line.offset >= unit.stop:
                return
            yield line


def _is_text(head: bytes) -> bool:
    """A download tool may have inflated the file and kept its name."""
    return head.lstrip(_BOM).lstrip()[:1] in (b"{", b"[")


def _range(stream: BinaryIO, unit: Unit, report: Report) -> Iterator[Line]:
    # A line that begins exactly at the start is this unit's; any other that reaches into it belongs to the one before.
    stream.seek(unit.start - 1)
    for line in cut(unit.path, pieces(stream, _PIECE), report, at=unit.start - 1):
        if line.offset == unit.start - 1:
            continue
        if unit.stop is not None and line.offset >= unit.stop:
            return
        yield Line(None, line.offset, line.data)


def cut(path: str, content: Iterable[bytes], report: Report, at: int = 0) -> Iterator[Line]:
    """Lines of a stream that comes in pieces and begins at byte `at`. The rest after a cut is reported, not given."""
    number, begun, held = 1, [], 0  # pieces of a line whose end has not come yet, and their bytes
    try:
        for piece in content:
            first, *lines = piece.split(b"\n")
            held += len(first)
            if held <= LONGEST_LINE:
                begun.append(first)
            else:
                begun = []
            if not lines:
                continue
            if held > LONGEST_LINE:
                report(Fault(path, f"byte {at}", f"a line of {held:,} bytes"))
                number, at = number + 1, at + held + 1
            else:
                lines.insert(0, b"".join(begun))
            last = lines.pop()
            for data in lines:
                yield Line(number, at, data)
                number, at = number + 1, at + len(data) + 1
            begun, held = [last], len(last)
    except Damaged as damage:
        place = f"line {number}, byte {at} of the content (byte {damage.at} of the file)"
        report(Fault(path, place, damage.reason, ends_unit=True))
        return
    if held > LONGEST_LINE:
        report(Fault(path, f"byte {at}", f"a line of {held:,} bytes"))
    elif held:
        yield Line(number, at, b"".join(begun))


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for an empty line. Raises ValueError saying what is wrong with it."""
    try:
        found = _loads(data)
    except ValueError:
        found = _loads_slowly(data)
    if isinstance(found, dict):
        return found
    if found is None and not data.strip():
        return None
    raise ValueError(f"a JSON {'array' if isinstance(found, list) else type(found).__name__}, not an object")


def _loads(data: bytes) -> Any:
    return _loads_slowly(data) if orjson is None else orjson.loads(data)


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
