"""Texts of a parquet column whose pages are too long to be held in memory: unpacked and read piece by piece.

A page holds at least one value, and pyarrow unpacks pages as a whole: for a text of 30 MB it takes up to 100 MB. Read
here are flat columns of strings, plain or with a dictionary, in pages of either version, uncompressed or compressed
with snappy, zstd or gzip: what pyarrow, parquet-mr and the Rust and Go writers make by default.
Format: github.com/apache/parquet-format, README.md, Encodings.md and src/main/thrift/parquet.thrift.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.formats.thrift import read_struct
from data_prep.formats.unpack import UNPACKERS, Cursor, unpacked
from data_prep.long_text import LONG, LongText, Spilled, long_text

LONG_PAGE = 8 << 20
"""Unpacked bytes from which a page is read here."""
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8
_ENCODINGS = {"PLAIN", "PLAIN_DICTIONARY", "RLE", "RLE_DICTIONARY", "BIT_PACKED"}
"""Those of the values that are read here, and of their levels, by pyarrow's names. BIT_PACKED is said of levels that
flat columns do not have."""

Text = str | LongText | UnicodeDecodeError | None


@dataclass(frozen=True)
class Page:
    kind: int
    at: int
    """Of its first byte behind the header, in the file."""
    size: int
    """Bytes in the file."""
    unpacked_size: int
    values: int
    """Nulls included."""
    encoding: int
    levels: int | None = None
    """Bytes of the levels that say what is null, not compressed; None: they are with the values (version 1)."""
    is_compressed: bool = True


def may_be_long(chunk: Any) -> bool:
    """Whether a column of a row group may have a long page. `chunk`: pyarrow's ColumnChunkMetaData."""
    return bool(chunk.total_uncompressed_size >= LONG_PAGE)


def long_pages(stream: BinaryIO, chunk: Any, column: Any, *, walk: bool) -> Iterable[Page] | None:
    """The pages of a column in one row group, when they may be long and all can be read here; else None.

    `chunk`: pyarrow's ColumnChunkMetaData; `column`: its ColumnSchema, of strings. `walk`: through all pages first, to
    see if one is long. It takes a seek for each, so over a network all chunks that might have one count as if they had.
    """
    flat = column.max_repetition_level == 0 and column.max_definition_level <= 1
    if not may_be_long(chunk) or not flat or chunk.compression not in UNPACKERS:
        return None
    try:
        if not walk:
            first = list(islice(_pages(stream, chunk), 2))  # a dictionary has a page of its own before the others
            known = _ENCODINGS.issuperset(chunk.encodings) and all(_is_known(page) for page in first)
            return _pages(stream, chunk) if known else None
        pages = list(_pages(stream, chunk))
    except ValueError:  # what is wrong with it is for pyarrow to say
        return None
    known = all(_is_known(page) for page in pages)
    return pages if known and any(page.unpacked_size >= LONG_PAGE for page in pages) else None


def longest_page(stream: BinaryIO, chunk: Any) -> int:
    """Unpacked bytes of a chunk's longest page, of any kind of column. 0 where no headers are found."""
    try:
        return max((page.unpacked_size for page in _pages(stream, chunk)), default=0)
    except ValueError:
        return 0


def _is_known(page: Page) -> bool:
    if page.kind == _DICTIONARY:
        return page.encoding in (_PLAIN, _PLAIN_DICTIONARY)
    return page.encoding in (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)


def _pages(stream: BinaryIO, chunk: Any) -> Iterator[Page]:
    """Raises ValueError when headers do not lead from one to the next up to the end."""
    at = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    end = at + chunk.total_compressed_size
    while at < end:
        stream.seek(at)
        fields = read_struct(stream)
        page = _page(fields, stream.tell())
        at = page.at + page.size
        if at > end or page.size < 0 or page.unpacked_size < 0 or page.values < 0:
            raise ValueError(f"no page header: it leads to byte {at}")
        if page.kind in (_DATA, _DICTIONARY, _DATA_V2):
            yield page


def _page(fields: dict[int, Any], at: int) -> Page:
    try:
        kind, unpacked_size, size = fields[1], fields[2], fields[3]
        if kind == _DATA:
            own = fields[5]
            if own[3] != _RLE:
                raise ValueError("levels as no writer makes them any more")
            return Page(kind, at, size, unpacked_size, own[1], own[2])
        if kind == _DICTIONARY:
            return Page(kind, at, size, unpacked_size, fields[7][1], fields[7][2])
        if kind == _DATA_V2:
            own = fields[8]
            return Page(kind, at, size, unpacked_size, own[1], own[4], own[5] + own[6], own.get(7, True))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no page header: field {error} is missing") from error
    return Page(kind, at, size, unpacked_size, 0, _PLAIN)


def texts(stream: BinaryIO, pages: Iterable[Page], codec: str, folder: Path, *, optional: bool) -> Iterator[Text]:
    """The values of the pages, one a row; long ones in files in `folder`, to be closed by who gets them.

    `optional`: values may be null. One that is not UTF-8 is the error that says so. Raises ValueError for a page that
    is broken.
    """
    dictionary: _Dictionary | None = None
    try:
        for page in pages:
            try:
                if page.kind == _DICTIONARY:
                    dictionary = _Dictionary(Cursor(_content(stream, page, codec)), page.values, folder)
                else:
                    yield from _data(stream, page, codec, dictionary, folder, optional)
            except ValueError as error:
                raise ValueError(f"page at byte {page.at}: {error}") from error
    finally:
        if dictionary is not None:
            dictionary.close()


def _content(stream: BinaryIO, page: Page, codec: str) -> Iterator[bytes]:
    """What is compressed of a page."""
    before = page.levels or 0
    size, unpacked_size = page.size - before, page.unpacked_size - before
    return unpacked(stream, page.at + before, size, codec if page.is_compressed else "UNCOMPRESSED", unpacked_size)


def _data(
    stream: BinaryIO, page: Page, codec: str, dictionary: "_Dictionary | None", folder: Path, optional: bool
) -> Iterator[Text]:
    cursor = Cursor(_content(stream, page, codec))
    present = np.ones(page.values, dtype=bool)
    if optional:
        if page.levels is None:
            levels = cursor.exactly(int.from_bytes(cursor.exactly(4), "little"))
        else:
            stream.seek(page.at)
            levels = stream.read(page.levels)
        present = runs(levels, 1, page.values).astype(bool)
    count = int(present.sum())
    values: Iterator[Text]
    if page.encoding == _PLAIN and page.unpacked_size < LONG_PAGE:
        values = iter(_short_page(cursor.rest(), count, folder))
    elif page.encoding == _PLAIN:
        values = (_plain(cursor, folder) for _ in range(count))
    elif dictionary is None:
        raise ValueError("its dictionary is missing")
    else:
        width = cursor.exactly(1)[0] if count else 0
        indices = runs(cursor.rest(), width, count) if width else np.zeros(count, np.int64)
        values = map(dictionary.text, indices.tolist())
    if count == page.values:
        yield from values
        return
    for there in present:
        yield next(values) if there else None


def _short_page(data: bytes, count: int, folder: Path) -> list[Text]:
    """`_plain` of all values of a page that is held."""
    found: list[Text] = []
    at = 0
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if start > len(data) or at > len(data):
            raise ValueError(f"{at - len(data)} bytes are missing at the end")
        found.append(_decoded(data[start:at]) if at - start <= LONG else _long(data[start:at], folder))
    return found


def _long(value: bytes, folder: Path) -> LongText | UnicodeDecodeError:
    try:
        return long_text((value,), folder)
    except UnicodeDecodeError as error:
        return error


def _plain(cursor: Cursor, folder: Path) -> Text:
    size = int.from_bytes(cursor.exactly(4), "little")
    if size <= LONG:
        return _decoded(cursor.exactly(size))
    blocks = cursor.blocks(size)
    try:
        return long_text(blocks, folder)
    except UnicodeDecodeError as error:
        for _ in blocks:  # the next value begins behind it
            pass
        return error


def _decoded(value: bytes) -> str | UnicodeDecodeError:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


class _Dictionary:
    """The values that pages name by number, in a file."""

    def __init__(self, cursor: Cursor, values: int, folder: Path) -> None:
        """Raises ValueError when the page ends too early."""
        self._folder = folder
        self._values = Spilled(folder)
        self._bounds: list[tuple[int, int]] = []
        try:
            for _ in range(values):
                size = int.from_bytes(cursor.exactly(4), "little")
                self._bounds.append((self._values.size, self._values.size + size))
                for block in cursor.blocks(size):
                    self._values.write(block)
        except BaseException:
            self._values.close()
            raise

    def text(self, number: int) -> Text:
        if number >= len(self._bounds):
            raise ValueError(f"value {number} of a dictionary of {len(self._bounds)}")
        start, stop = self._bounds[number]
        blocks = self._values.part(start, stop)
        if stop - start <= LONG:
            return _decoded(b"".join(blocks))
        try:
            return long_text(blocks, self._folder)
        except UnicodeDecodeError as error:
            return error

    def close(self) -> None:
        self._values.close()


def runs(data: bytes, width: int, count: int) -> np.ndarray:
    """int64[count] of `width` bits each in parquet's hybrid of runs and packed bits. Raises ValueError when cut off."""
    found = np.empty(count, dtype=np.int64)
    at = done = 0
    weights = np.left_shift(1, np.arange(width, dtype=np.int64))
    while done < count:
        head, at = _number(data, at)
        if head & 1:
            packed = np.frombuffer(data[at : at + (head >> 1) * width], np.uint8)
            at += len(packed)
            bits = np.unpackbits(packed, bitorder="little")
            values = bits[: len(bits) // width * width].reshape(-1, width) @ weights
        else:
            size = (width + 7) // 8
            value = int.from_bytes(data[at : at + size], "little")
            at += size
            values = np.full(min(head >> 1, count - done), value, dtype=np.int64)
        if at > len(data) or not len(values):
            raise ValueError("levels or indices are cut off")
        values = values[: count - done]
        found[done : done + len(values)] = values
        done += len(values)
    return found


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
    raise ValueError("levels or indices are cut off")
