"""Parquet files, read in small batches with only the columns that are asked for.

A row group may hold gigabytes, so none is ever read whole; nor is a page, where a text fills it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from data_prep.formats.files import File, Options, is_url, local, open_file
from data_prep.formats.parquet_pages import Page, long_pages, longest_page, may_be_long, texts
from data_prep.formats.tables import (
    BATCH_BYTES,
    MOST_ROWS,
    Column,
    Row,
    arrow_package,
    columns_of,
    rows_in,
    runs_of,
    short_reason,
)
from data_prep.long_text import LongText
from data_prep.memory import DOCUMENT_MEMORY, PAGE, Apart, TooLargeError, check_size
from data_prep.sources.base import Fault, Report, Unit
from ouro_megatron.errors import DataError


def parquet_columns(file: File, options: Options) -> list[Column] | None:
    """Columns of a file; None when it holds no rows. Raises ValueError when it cannot be read."""
    with _parquet(file.path, options) as table:
        return columns_of(table.schema_arrow) if table.metadata.num_rows else None


@contextmanager
def _parquet(path: str, options: Options) -> Iterator[Any]:
    """Raises ValueError when the file has no valid footer."""
    pa = arrow_package()
    with open_file(path, options) as stream:
        try:
            # Without pre_buffer and with a buffer, column chunks are streamed instead of held.
            table = pa.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"no whole parquet file: {short_reason(error)}") from error
        yield table


def split_parquet(file: File, target_bytes: int, options: Options) -> list[Unit]:
    """Runs of row groups of about `target_bytes` on disk; a small or unreadable file is one unit."""
    if file.size <= target_bytes:
        return [file.unit()]
    try:
        with _parquet(file.path, options) as table:
            metadata = table.metadata
            sizes = [_stored(metadata.row_group(index)) for index in range(metadata.num_row_groups)]
    except ValueError:  # reading the unit reports it
        return [file.unit()]
    return runs_of(file, sizes, target_bytes)


def _stored(group: Any) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def read_parquet(
    unit: Unit, wanted: Sequence[str], report: Report, options: Options, apart: Apart | None = None
) -> Iterator[Row]:
    """Rows of the unit's row groups with those of the `wanted` columns that exist; () wants all."""
    try:
        with _parquet(unit.path, options) as table:
            metadata = table.metadata
            stop = metadata.num_row_groups if unit.stop is None else min(unit.stop, metadata.num_row_groups)
            first = sum(metadata.row_group(index).num_rows for index in range(unit.start))
            names = [name for name in table.schema_arrow.names if not wanted or name in wanted]
            for index in range(unit.start, stop):
                yield from _RowGroup(unit.path, options, table, index, first).rows(names, report, apart)
                first += metadata.row_group(index).num_rows
    except ValueError as error:
        report(Fault(unit.path, "byte 0", str(error), ends_unit=True))


class _RowGroup:
    """One row group of a file; `first` is the number of its first row in the file."""

    def __init__(self, path: str, options: Options, table: Any, index: int, first: int) -> None:
        self._path, self._options, self._table, self._index, self._first = path, options, table, index, first
        self._group = table.metadata.row_group(index)
        self._chunks = [self._group.column(number) for number in range(self._group.num_columns)]
        self._done = 0

    def rows(self, names: Sequence[str], report: Report, apart: Apart | None) -> Iterator[Row]:
        total = self._group.num_rows
        if total == 0:
            return
        try:
            if apart is None or not any(map(may_be_long, self._chunks_of(names))):
                yield from self._from_batches(names, report, apart)
            else:
                with open_file(local(self._path), self._options) as stream:
                    yield from self._from_large(stream, names, report, apart)
        except (arrow_package().ArrowException, OSError, ValueError) as error:
            lost = f"its rows {self._first + self._done} to {self._first + total - 1} are lost"
            self._tell(report, f"row group {self._index}: {short_reason(error)}; {lost}")
            return
        if self._done != total:
            self._tell(report, f"row group {self._index} holds {self._done} rows, its footer says {total}")

    def _tell(self, report: Report, reason: str) -> None:
        report(Fault(self._path, f"row {self._first + self._done}", reason))

    def _from_large(self, stream: BinaryIO, names: Sequence[str], report: Report, apart: Apart) -> Iterator[Row]:
        column = apart.column if apart.column in names else None
        pages = None if column is None else self._long_pages(stream, column)
        self._check_pages(
            stream, [name for name in names if pages is None or name != column], max(apart.memory, DOCUMENT_MEMORY)
        )
        if column is None or pages is None:
            yield from self._from_batches(names, report, apart)
        else:
            yield from self._from_pages(stream, names, column, report, apart, pages)

    def _check_pages(self, stream: BinaryIO, names: Sequence[str], memory: int) -> None:
        """Raises DataError when pyarrow would have to unpack a page that takes more than `memory`.

        Not a fault: a page may hold any number of documents, none of them too long.
        """
        for chunk in self._chunks_of(names):
            if chunk.total_uncompressed_size * PAGE > memory:
                what = f"a page of column {chunk.path_in_schema!r}"
                try:
                    check_size(what, longest_page(stream, chunk), PAGE, memory)
                except TooLargeError as error:
                    raise DataError(
                        f"{self._path}, row group {self._index}: {error}. Raise it for this source"
                    ) from error

    def _chunks_of(self, names: Sequence[str]) -> list[Any]:
        return [chunk for chunk in self._chunks if chunk.path_in_schema.split(".")[0] in names]

    def _from_batches(self, names: Sequence[str], report: Report, apart: Apart | None) -> Iterator[Row]:
        for batch in self._batches(names):
            yield from rows_in(self._path, batch, self._first + self._done, report, apart)
            self._done += batch.num_rows
            del batch  # not held while the next one is unpacked

    def _batches(self, names: Sequence[str]) -> Iterator[Any]:
        size = sum(chunk.total_uncompressed_size for chunk in self._chunks_of(names))
        rows = max(1, min(MOST_ROWS, BATCH_BYTES * self._group.num_rows // max(1, size)))
        yield from self._table.iter_batches(batch_size=rows, row_groups=[self._index], columns=list(names))

    def _long_pages(self, stream: BinaryIO, column: str) -> Iterable[Page] | None:
        """The pages of a column when they are to be read one by one."""
        kinds = arrow_package().types
        kind = self._table.schema_arrow.field(column).type
        number = next((n for n, chunk in enumerate(self._chunks) if chunk.path_in_schema == column), None)
        if number is None or not (kinds.is_string(kind) or kinds.is_large_string(kind)):
            return None
        walk = not is_url(local(self._path))
        return long_pages(stream, self._chunks[number], self._table.schema.column(number), walk=walk)

    def _from_pages(
        self,
        stream: BinaryIO,
        names: Sequence[str],
        column: str,
        report: Report,
        apart: Apart,
        pages: Iterable[Page],
    ) -> Iterator[Row]:
        number = next(n for n, chunk in enumerate(self._chunks) if chunk.path_in_schema == column)
        optional = self._table.schema.column(number).max_definition_level == 1
        rest = self._other_values([name for name in names if name != column])
        for text in texts(stream, pages, self._chunks[number].compression, apart.folder, optional=optional):
            values = next(rest, None)
            if values is None:
                raise ValueError("its columns are not of the same length")
            try:
                if isinstance(text, UnicodeDecodeError):
                    self._tell(report, str(text))
                elif isinstance(values, ValueError):
                    self._tell(report, str(values))
                else:
                    values[column] = text
                    yield Row(f"row {self._first + self._done}", values)
            finally:
                if isinstance(text, LongText):
                    text.close()
            self._done += 1

    def _other_values(self, names: Sequence[str]) -> Iterator[dict[str, Any] | ValueError]:
        """The values of other columns, row by row; the error of a row that cannot be had."""
        if not names:
            while True:
                yield {}
        for batch in self._batches(names):
            try:
                columns = [batch.column(name).to_pylist() for name in names]
            except ValueError:
                yield from self._one_by_one(batch, names)
            else:
                yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))

    @staticmethod
    def _one_by_one(batch: Any, names: Sequence[str]) -> Iterator[dict[str, Any] | ValueError]:
        for index in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[index].as_py() for name in names}
            except ValueError as error:
                yield error
