"""JSON lines, plain or compressed: one object a line, its text in one field."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import zstandard

from data_prep.sources.base import Document, Fault, Report, SourceBase, Unit
from data_prep.sources.files import find_files, ranges_of, stamp_of

_COMPRESSED = {".gz", ".zst", ".zstd"}
_PIECE = 1 << 17


class JsonLines(SourceBase):
    kind: Literal["jsonl"]
    path: Path
    """A file, or a folder searched with `pattern`."""
    pattern: str = "**/*.json*"
    """For a folder; .gz and .zst files are opened by their suffix."""
    text: str = "text"
    """Field of the document's text."""
    key: str | None = None
    """Field that decides about holding out, such as "url"; the text itself when absent."""

    def units(self, target_bytes: int) -> list[Unit]:
        units: list[Unit] = []
        for file in find_files(self.name, self.path, self.pattern):
            if file.suffix in _COMPRESSED:
                units.append(Unit(str(file), file.stat().st_size, stamp=stamp_of(file)))
            else:
                units.extend(ranges_of(file, target_bytes))
        return units

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        for offset, line in _lines(unit, report):
            if not line.strip():
                continue
            try:
                yield self._document(line)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = f"no field {error}" if isinstance(error, KeyError) else str(error)
                report(Fault(unit.path, f"byte {offset}", what))

    def _document(self, line: bytes) -> Document:
        fields: Any = json.loads(line.decode("utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__}, not an object")
        text = fields[self.text]
        if not isinstance(text, str):
            raise ValueError(f"field {self.text!r} is a {type(text).__name__}, not text")
        others = {name: value for name, value in fields.items() if name != self.text}
        return Document(text if self.key is None else str(fields[self.key]), text, fields=others)


def _lines(unit: Unit, report: Report) -> Iterator[tuple[int, bytes]]:
    """(offset in the uncompressed file, line) of each line that begins in the unit.

    Cut at b"\\n" alone: text may hold other characters that Python takes for line ends.
    """
    path = Path(unit.path)
    offset, begun = 0, []  # the pieces of a line whose end is not read yet
    try:
        if path.suffix not in _COMPRESSED:
            yield from _plain_lines(path, unit)
            return
        for piece in _zstd(path) if path.suffix != ".gz" else _gzip(path):
            first, *lines = piece.split(b"\n")
            begun.append(first)
            if not lines:
                continue
            lines.insert(0, b"".join(begun))
            begun = [lines.pop()]
            for line in lines:
                yield offset, line
                offset += len(line) + 1
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        # The last line is cut too: it is never yielded.
        report(Fault(unit.path, f"byte {offset} of the content", str(error), ends_unit=True))
        return
    if last := b"".join(begun):
        yield offset, last


def _plain_lines(path: Path, unit: Unit) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        if unit.start > 0:
            # A line that begins exactly at the start is this unit's, any other belongs to the unit before.
            stream.seek(unit.start - 1)
            stream.readline()
        while unit.stop is None or stream.tell() < unit.stop:
            offset = stream.tell()
            line = stream.readline()
            if not line:
                return
            yield offset, line


def _gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def _zstd(path: Path) -> Iterator[bytes]:
    """All frames. Raises EOFError when the last one does not end: the library's own reader stops there in silence."""
    with path.open("rb") as stream:
        frame = None
        rest = b""
        while piece := rest or stream.read(_PIECE):
            rest = b""
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(piece)
            if frame.eof:
                rest, frame = frame.unused_data, None
        if frame is not None:
            raise EOFError("the file ends inside a zstd frame: it was cut short")
