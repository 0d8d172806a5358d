"""A part of a file unpacked piece by piece, and what comes out of it read value by value."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

_BLOCK = 1 << 20
_WINDOW = 1 << 20
"""Bytes that stay at hand for snappy's copies, which reach back 64 KiB as all known writers make them."""


class Part:
    """Bytes `at` to `at + size` of a file as a file of their own, to be read once from front to back."""

    def __init__(self, stream: BinaryIO, at: int, size: int) -> None:
        self._stream, self._at, self._left = stream, at, size

    def read(self, size: int = -1) -> bytes:
        self._stream.seek(self._at)
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._at += len(data)
        self._left -= len(data)
        return data


def _as_it_is(part: Part) -> Iterator[bytes]:
    while block := part.read(_BLOCK):
        yield block


def _gunzipped(part: Part) -> Iterator[bytes]:
    try:
        unpacker: Any = gzip.GzipFile(fileobj=part)  # type: ignore[call-overload]
        while block := unpacker.read(_BLOCK):
            yield block
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"broken gzip: {error}") from error


def _unzstd(part: Part) -> Iterator[bytes]:
    import zstandard

    try:
        unpacker = zstandard.ZstdDecompressor().stream_reader(part, read_across_frames=True)  # type: ignore[arg-type]
        while block := unpacker.read(_BLOCK):
            yield block
    except zstandard.ZstdError as error:
        raise ValueError(f"broken zstd: {error}") from error


def _unsnapped(part: Part) -> Iterator[bytes]:
    source = part.read(_BLOCK)
    at = next((place + 1 for place, byte in enumerate(source[:10]) if byte < 0x80), 0)  # behind the length
    window = bytearray(_WINDOW + _BLOCK)
    filled = told = literal = 0
    while source:
        more = part.read(_BLOCK)
        while True:
            try:
                place, filled, literal = _snappy.decode(source, at, not more, window, filled, literal)
            except ValueError as error:
                raise ValueError(f"broken snappy: {error}") from error
            moved, at = place > at, place
            if filled > told:
                yield bytes(memoryview(window)[told:filled])
                kept = min(filled, _WINDOW)
                window[:kept] = window[filled - kept : filled]
                filled = told = kept
            if not moved:
                break
        source, at = source[at:] + more, 0
        if not more and (source or literal):
            raise ValueError("broken snappy: it ends too early")


UNPACKERS: dict[str, Callable[[Part], Iterator[bytes]]] = {
    "UNCOMPRESSED": _as_it_is,
    "GZIP": _gunzipped,
    "ZSTD": _unzstd,
}
"""By parquet's names. They raise ValueError for broken data."""

with suppress(ImportError):  # a C extension; pyarrow unpacks whole pages where there was no compiler
    from data_prep import _snappy

    UNPACKERS["SNAPPY"] = _unsnapped


def unpacked(stream: BinaryIO, at: int, size: int, codec: str, unpacked_size: int) -> Iterator[bytes]:
    """Raises ValueError, after all that could be had, when this is not `unpacked_size` bytes."""
    left = unpacked_size
    for block in UNPACKERS[codec](Part(stream, at, size)):
        left -= len(block)
        if left < 0:
            raise ValueError(f"more than the {unpacked_size} bytes that its header promises")
        yield block
    if left:
        raise ValueError(f"{left} of {unpacked_size} bytes are missing")


class Cursor:
    """Goes through blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block, self._at = b"", 0

    def exactly(self, size: int) -> bytes:
        """The next bytes. Raises ValueError when there are not so many."""
        stop = self._at + size
        if stop <= len(self._block):
            data = self._block[self._at : stop]
            self._at = stop
            return data
        return b"".join(self.blocks(size))

    def blocks(self, size: int) -> Iterator[bytes]:
        """The next bytes in pieces."""
        while size:
            if self._at == len(self._block):
                self._block, self._at = next(self._blocks, b""), 0
                if not self._block:
                    raise ValueError(f"{size} bytes are missing at the end")
            data = self._block[self._at : self._at + size]
            self._at += len(data)
            size -= len(data)
            yield data

    def rest(self) -> bytes:
        """All that is left."""
        rest = b"".join([self._block[self._at :], *self._blocks])
        self._block, self._at = b"", 0
        return rest
