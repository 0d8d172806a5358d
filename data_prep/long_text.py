"""Texts that are too long to be held in memory: UTF-8 in a temporary file without a name, read a piece at a time."""

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

LONG = 1 << 20
"""Bytes from which a line, a field or a file is kept out of memory, where its reader has a folder for that."""
_BLOCK = 1 << 20


class Mapped(NamedTuple):
    """A file's bytes, read from disk where they are looked at."""

    bytes: mmap.mmap

    def forget(self, done: int) -> None:
        """Lets go of the pages before byte `done`; they would be read again."""
        whole = done // mmap.PAGESIZE * mmap.PAGESIZE
        if whole and hasattr(mmap, "MADV_DONTNEED"):
            self.bytes.madvise(mmap.MADV_DONTNEED, 0, whole)


class Spilled:
    """Bytes in a temporary file, which is gone with this object, or with the process."""

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.size += len(data)

    def blocks(self) -> Iterator[bytes]:
        """All bytes in pieces."""
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            yield block

    def part(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` in pieces."""
        self._file.seek(start)
        while start < stop and (block := self._file.read(min(_BLOCK, stop - start))):
            start += len(block)
            yield block

    @contextmanager
    def mapped(self) -> Iterator[Mapped]:
        """Raises ValueError for a file without bytes."""
        self._file.flush()
        with mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ) as content:
            yield Mapped(content)

    def close(self) -> None:
        self._file.close()


class LongText(Spilled):
    """A text. Made by `long_text`, which sees to it that it is UTF-8."""

    characters: int = 0

    def digest(self, salt: bytes = b"") -> "hashlib._Hash":
        """SHA-256 of `salt` and the text."""
        digest = hashlib.sha256(salt)
        for block in self.blocks():
            digest.update(block)
        return digest

    def pieces(self) -> Iterator[str]:
        """The text in pieces of whole characters."""
        rest = b""
        for block in self.blocks():
            text, rest = decode(rest + block)
            yield text

    def beginning(self, characters: int) -> str:
        """The first characters, so many or all."""
        self._file.seek(0)
        return decode(self._file.read(4 * characters))[0][:characters]

    def whole(self) -> str:
        return "".join(self.pieces())


def long_text(blocks: Iterable[bytes], folder: Path) -> LongText:
    """A text that comes in blocks of bytes. Raises UnicodeDecodeError, its `start` counted from the first byte."""
    text = LongText(folder)
    rest, at = b"", 0
    try:
        for block in blocks:
            data = rest + block
            rest = data[_whole(data, at) :]
            at += len(data) - len(rest)
            text.write(memoryview(data)[: len(data) - len(rest)])
            bytes_of = np.frombuffer(data, np.uint8, len(data) - len(rest))
            text.characters += int(np.count_nonzero((bytes_of & 0xC0) != 0x80))
        if rest:
            raise UnicodeDecodeError("utf-8", rest, at, at + len(rest), "unexpected end of data")
    except BaseException:
        text.close()
        raise
    return text


def decode(data: bytes) -> tuple[str, bytes]:
    """The text of the whole characters, and the bytes of a last one that is not whole. Raises UnicodeDecodeError."""
    whole = _whole(data, 0)
    return data[:whole].decode("utf-8"), data[whole:]


def _whole(data: bytes, at: int) -> int:
    """Bytes of whole characters; up to three of a last one may be left. Raises UnicodeDecodeError with `at` added."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and error.end == len(data):
            return error.start
        raise UnicodeDecodeError("utf-8", data, at + error.start, at + error.end, error.reason) from error
    return len(data)
