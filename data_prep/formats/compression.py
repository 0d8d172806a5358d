"""Compressed streams, inflated piece by piece. A cut stream is noticed: several libraries end there in silence."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

from data_prep.formats.files import pieces

_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
_PIECE = 1 << 17
_ZSTD_PIECE = 1 << 12
"""What a piece of zstd holds comes at one time, and four bytes can stand for 128 kB: 134 MB at most."""
_MOST_AT_ONCE = 1 << 22
"""Inflated bytes held at one time, where the library lets us say so."""


class Damaged(Exception):
    """What follows cannot be inflated. `at`: bytes of the compressed stream read until then."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


def codec_of(path: str) -> str | None:
    """The compression that a file's name promises; None for a plain file."""
    return next((codec for suffix, codec in _SUFFIXES.items() if path.endswith(suffix)), None)


def bare_name(path: str) -> str:
    """`path` without the suffix of its compression."""
    return next((path.removesuffix(suffix) for suffix in _SUFFIXES if path.endswith(suffix)), path)


def codec_of_bytes(head: bytes) -> str | None:
    """The compression that a file's first bytes show; no text begins like one of them.

    pzstd begins a file with a skippable frame, whose magic number has sixteen forms.
    """
    if len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    return next((codec for magic, codec in _MAGIC.items() if head.startswith(magic)), None)


def inflate(stream: BinaryIO, codec: str) -> Iterator[bytes]:
    """The content of all members (frames) of a stream, in pieces. Raises Damaged, after all that could be read."""
    return inflate_pieces(pieces(stream, _ZSTD_PIECE if codec == "zstd" else _PIECE), codec)


def inflate_pieces(source: Iterable[bytes], codec: str) -> Iterator[bytes]:
    """`inflate` of a stream that comes in pieces."""
    new, step, kinds = _CODECS[codec]
    member: Any = None
    read = members = 0
    for piece in source:
        rest = piece
        while rest:
            if member is None:
                if codec == "gzip" and members and not rest.strip(b"\0"):
                    break  # padding after the last member is allowed
                member = new()
            try:
                yield from step(member, rest)
            except kinds as error:
                what = "what follows is no" if members and not getattr(member, "produced", True) else "broken"
                raise Damaged(f"{what} {codec} data: {error}", read + len(piece) - len(rest)) from error
            if not member.eof:
                break
            rest, member, members = member.unused_data, None, members + 1
        read += len(piece)
    if member is not None or not members:
        raise Damaged("the file is empty" if not read else f"the {codec} data ends before its end mark: cut off", read)


def _step_zlib(member: Any, data: bytes) -> Iterator[bytes]:
    while True:
        yield member.decompress(data, _MOST_AT_ONCE)
        data = member.unconsumed_tail
        if not data:
            return


def _step_bounded(member: Any, data: bytes) -> Iterator[bytes]:
    yield member.decompress(data, _MOST_AT_ONCE)
    while not (member.eof or member.needs_input):
        yield member.decompress(b"", _MOST_AT_ONCE)


def _step_zstd(member: Any, data: bytes) -> Iterator[bytes]:
    yield member.decompress(data)


def _new_zstd() -> Any:
    # The largest window that `zstd --long=31` can ask for.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_Step = Callable[[Any, bytes], Iterator[bytes]]
_CODECS: dict[str, tuple[Callable[[], Any], _Step, tuple[type[Exception], ...]]] = {
    "gzip": (lambda: zlib.decompressobj(31), _step_zlib, (zlib.error,)),
    "zstd": (_new_zstd, _step_zstd, (zstandard.ZstdError,)),
    "xz": (lzma.LZMADecompressor, _step_bounded, (lzma.LZMAError,)),
    "bzip2": (bz2.BZ2Decompressor, _step_bounded, (OSError, ValueError)),
}
