"""Places where a gzip stream can be entered, noted in one pass, so that many workers can read one stream.

The index is a file in the format of the package indexed_gzip, which finds the places, and a small note (JSON) that says
which parts it belongs to. Reading needs the standard library alone: a place is a bit of the compressed stream and the
32 KiB of content before it.
"""

import hashlib
import io
import json
import struct
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.formats.compression import Damaged, inflate_pieces
from ouro_megatron.errors import DataError

_HEAD = struct.Struct("<5sBBQQIII")
_POINT = struct.Struct("<QQBB")
_MAGIC = b"GZIDX"
_MEMBER = b"\x1f\x8b\x08"
_TRAILER = 8
"""Bytes of checksum and length after a member's data."""
_WINDOW = 32768
_LEAST_SPACING, _MOST_SPACING = 1 << 20, 1 << 28
"""Bytes of content between two places; each costs 32 KiB of index."""
_SAVE_SECONDS = 60.0
_READ = 1 << 22

Pieces = Callable[[int], Iterator[bytes]]
"""Bytes of the compressed stream from a given one on."""


class Point(NamedTuple):
    content: int
    """Byte of the content."""
    compressed: int
    """Byte of the stream that the deflate data go on in, or the one after it when `bits` is not 0."""
    bits: int
    """Bits of the byte before `compressed` that are still to be read."""
    window: int
    """Number of the stored window, or -1 at the beginning of a member, which needs none."""


@dataclass(frozen=True)
class GzipIndex:
    path: Path
    content: int
    """Bytes of content."""
    points: Sequence[Point]

    def window(self, point: Point) -> bytes:
        if point.window < 0:
            return b""
        with self.path.open("rb") as stream:
            count = _HEAD.unpack(stream.read(_HEAD.size))[-1]
            stream.seek(_HEAD.size + _POINT.size * count + _WINDOW * point.window)
            return stream.read(_WINDOW)

    def read(self, start: int, pieces: Pieces) -> tuple[int, Iterator[bytes]]:
        """(byte of the content where reading begins, content from there on); it begins at or before `start`."""
        if not self.points:  # a stream smaller than the distance of two places
            return 0, inflate_pieces(pieces(0), "gzip")
        at = bisect_right(self.points, start, key=lambda point: point.content) - 1
        return self.points[at].content, self._from(self.points[at], pieces)

    def _from(self, point: Point, pieces: Pieces) -> Iterator[bytes]:
        end = yield from _inflate_from(point, self.window(point), pieces)
        following = _next_member(end, pieces)
        if following is None:
            return
        try:
            yield from inflate_pieces(pieces(following), "gzip")
        except Damaged as damage:
            raise Damaged(damage.reason, following + damage.at) from damage


def _inflate_from(point: Point, window: bytes, pieces: Pieces) -> Generator[bytes, None, tuple[int, ...]]:
    """Content up to the end of a member; returns the bytes of the stream at which its trailer may begin.

    There are two when reading began inside a byte: up to seven bits of the last byte may belong to the data or not.
    Raises Damaged.
    """
    inflater = zlib.decompressobj(-15, zdict=window) if window else zlib.decompressobj(-15)
    first = point.compressed - (point.bits > 0)
    shift = (8 - point.bits) % 8
    read = 0
    try:
        for piece in _shifted(pieces(first), shift):
            read += len(piece)
            rest = piece
            while rest and not inflater.eof:
                yield inflater.decompress(rest, _READ)
                rest = inflater.unconsumed_tail
            if inflater.eof:
                end = first + read - len(inflater.unused_data)
                return (end, end + 1) if shift else (end,)
    except zlib.error as error:
        raise Damaged(f"broken gzip data: {error}", first + read) from error
    raise Damaged("the gzip data ends before its end mark: cut off", first + read)


def _next_member(trailers: Sequence[int], pieces: Pieces) -> int | None:
    """Where the member after a trailer begins; None at the end of the stream, which zeros may fill up."""
    heads = [_bytes_at(start + _TRAILER, len(_MEMBER), pieces) for start in trailers]
    for start, head in zip(trailers, heads, strict=True):
        if head == _MEMBER:
            return start + _TRAILER
    if any(head.strip(b"\0") == b"" for head in heads):
        return None
    raise Damaged("what follows is no gzip data", trailers[0])


def _bytes_at(start: int, count: int, pieces: Pieces) -> bytes:
    found = b""
    for piece in pieces(start):
        found += piece
        if len(found) >= count:
            break
    return found[:count]


def _shifted(pieces: Iterator[bytes], bits: int) -> Iterator[bytes]:
    """The stream without its first `bits` bits: deflate data may begin inside a byte, zlib reads from whole ones."""
    if bits == 0:
        yield from pieces
        return
    held = b""
    for piece in pieces:
        data = np.frombuffer(held + piece, np.uint8)
        yield ((data[:-1] >> bits) | (data[1:] << np.uint8(8 - bits))).tobytes()
        held = data[-1:].tobytes()
    if held:
        yield bytes([held[0] >> bits])


def index_file(stream: str, folder: str | None) -> Path:
    """Beside the stream, or in a folder of its own."""
    name = stream.rsplit("/", 1)[-1]
    return Path(folder or stream.rpartition("/")[0]) / f"{name}.gzidx"


def read_index(path: Path, parts: Sequence[tuple[str, int]]) -> GzipIndex | None:
    """The index, or None when there is none. `parts`: name and size of each part.

    Raises DataError when it belongs to other parts or is broken.
    """
    note = path.with_suffix(".gzidx.note")
    if not note.is_file():
        return None
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        with path.open("rb") as stream:
            if found["parts"] != [list(part) for part in parts]:
                raise DataError(
                    f"{path}: was made for other parts than those that are there; remove it and run `ouro data index`"
                )
            return GzipIndex(path, int(found["content"]), _points(stream, int(found["content"])))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it and run `ouro data index`") from error


def _points(stream: BinaryIO, end: int) -> list[Point]:
    """All but one at the end of the content, where nothing follows."""
    magic, version, _, _, _, _, window, count = _HEAD.unpack(stream.read(_HEAD.size))
    if magic != _MAGIC or version != 1 or window != _WINDOW:
        raise ValueError("no index of the known version")
    points: list[Point] = []
    windows = 0
    for _ in range(count):
        compressed, content, bits, has_window = _POINT.unpack(stream.read(_POINT.size))
        points.append(Point(content, compressed, bits, windows if has_window else -1))
        windows += has_window
    return [point for point in points if point.content < end]


def build_index(
    path: Path,
    stream: Any,
    parts: Sequence[tuple[str, int]],
    advance: Callable[[int], None],
    spacing: int | None = None,
) -> GzipIndex:
    """Reads all of a stream once and writes its index, the note last. Goes on where a killed run stopped.

    `stream`: seekable binary file over the joined parts. `advance`: told the bytes of the stream read so far.
    Raises DataError when the stream is damaged or cut off, or when indexed_gzip is missing.
    """
    size = sum(size for _, size in parts)
    wanted = spacing or min(_MOST_SPACING, max(_LEAST_SPACING, size * 3 // 4000))
    state = _State(path, hashlib.sha256(json.dumps([parts, wanted]).encode()).hexdigest())
    reader = state.open(stream, wanted)
    content, crc = state.content, state.crc
    reader.seek(content)
    saved = time.monotonic()
    try:
        while piece := reader.read(min(_READ, wanted)):
            crc = zlib.crc32(piece, crc)
            content += len(piece)
            advance(min(size, stream.tell()))
            if time.monotonic() - saved > _SAVE_SECONDS:
                state.save(reader, content, crc)
                saved = time.monotonic()
    except Exception as error:  # the package has errors of its own beside OSError and EOFError
        raise DataError(f"{path.name.removesuffix('.gzidx')}: near byte {stream.tell()}: {error}") from error
    state.save(reader, content, crc)
    with state.partial.open("rb") as file:
        index = GzipIndex(state.partial, content, _points(file, content))
    _check_end(index, stream, size, crc)
    state.finish(parts, content)
    return GzipIndex(path, content, index.points)


@dataclass
class _State:
    """What a run that is killed leaves behind."""

    path: Path
    key: str
    content: int = 0
    crc: int = 0

    @property
    def partial(self) -> Path:
        return self.path.with_suffix(".gzidx.part")

    @property
    def note(self) -> Path:
        return self.path.with_suffix(".gzidx.part.note")

    def open(self, stream: Any, spacing: int) -> Any:
        try:
            import indexed_gzip
        except ImportError as error:
            raise DataError(
                'an index needs indexed_gzip; install it with: pip install "ouro-megatron[data]"'
            ) from error
        settings = {"fileobj": stream, "spacing": spacing, "window_size": _WINDOW, "readbuf_size": 1 << 20}
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))
            if found["key"] == self.key and found["bytes"] == self.partial.stat().st_size:
                self.content, self.crc = found["content"], found["crc"]
                return indexed_gzip.IndexedGzipFile(**settings, index_file=str(self.partial))
        except (OSError, ValueError, KeyError):
            pass
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return indexed_gzip.IndexedGzipFile(**settings)

    def save(self, reader: Any, content: int, crc: int) -> None:
        fresh = self.partial.with_name(self.partial.name + ".new")
        reader.export_index(str(fresh))
        size = fresh.stat().st_size
        self.note.unlink(missing_ok=True)
        fresh.replace(self.partial)
        self.note.write_text(json.dumps({"key": self.key, "content": content, "crc": crc, "bytes": size}))

    def finish(self, parts: Sequence[tuple[str, int]], content: int) -> None:
        self.partial.replace(self.path)
        note = self.path.with_suffix(".gzidx.note")
        fresh = note.with_name(note.name + ".part")
        fresh.write_text(json.dumps({"parts": [list(part) for part in parts], "content": content}), encoding="utf-8")
        fresh.replace(note)
        self.note.unlink(missing_ok=True)


def _check_end(index: GzipIndex, stream: BinaryIO, size: int, crc: int) -> None:
    """indexed_gzip takes the end of the file for the end of the stream, and lets a wrong checksum pass.

    A stream of one member was checked while it was read; one of several is read once more.
    """
    name = index.path.name.removesuffix(".gzidx.part")

    def pieces(start: int) -> Iterator[bytes]:
        stream.seek(start)
        while piece := stream.read(1 << 17):
            yield piece

    stream.seek(max(0, size - 1024), io.SEEK_SET)
    tail = stream.read().rstrip(b"\0")
    trailer = struct.pack("<II", crc, index.content & 0xFFFFFFFF)
    # Zeros may end the trailer as well as pad the file.
    one_member = any((tail + b"\0" * zeros).endswith(trailer) for zeros in range(_TRAILER + 1))
    try:
        start, content = index.read(index.content, pieces) if one_member else (0, inflate_pieces(pieces(0), "gzip"))
        reached = start + sum(len(piece) for piece in content)
    except Damaged as damage:
        raise DataError(f"{name}: byte {damage.at}: {damage.reason}. Download that part again") from damage
    if reached != index.content:
        raise DataError(f"{name}: {index.content} bytes of content were read, its end is at {reached}")
