"""Parquet files, read in small batches with only the columns that are asked for.

A row group may hold gigabytes, so none is ever read whole; nor is a page, where a text fills it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

from data_prep.formats.files import File, Options, is_url, local, open_file
from data_prep.formats.long_json import Apart, kept_while_used
from data_prep.formats.parquet_pages import Page, long_pages, texts
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
from data_prep.sources.base import Fault, Report, Unit


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
                yield from _RowGroup(unit.path, table, index, first).rows(names, report, apart)
                first += metadata.row_group(index).num_rows
    except ValueError as error:
        report(Fault(unit.path, "byte 0", str(error), ends_unit=True))


class _RowGroup:
    """One row group of a file; `first` is the number of its first row in the file."""

    def __init__(self, path: str, table: Any, index: int, first: int) -> None:
        self._path, self._table, self._index, self._first = path, table, index, first
        self._group = table.metadata.row_group(index)
        self._chunks = [self._group.column(number) for number in range(self._group.num_columns)]
        self._done = 0

    def rows(self, names: Sequence[str], report: Report, apart: Apart | None) -> Iterator[Row]:
        total = self._group.num_rows
        if total == 0:
            return
        pages = None if apart is None or apart.column not in names else self._long_pages(apart.column)
        try:
            if pages is None or apart is None:
                yield from self._from_batches(names, report, apart)
            else:
                yield from self._from_pages(names, report, apart, pages)
        except (arrow_package().ArrowException, OSError, ValueError) as error:
            lost = f"its rows {self._first + self._done} to {self._first + total - 1} are lost"
            self._tell(report, f"row group {self._index}: {short_reason(error)}; {lost}")
            return
        if self._done != total:
            self._tell(report, f"row group {self._index} holds {self._done} rows, its footer says {total}")

    def _tell(self, report: Report, reason: str) -> None:
        report(Fault(self._path, f"row {self._first + self._done}", reason))

    def _from_batches(self, names: Sequence[str], report: Report, apart: Apart | None) -> Iterator[Row]:
        for batch in self._batches(names):
            yield from rows_in(self._path, batch, self._first + self._done, report, apart)
            self._done += batch.num_rows
            del batch  # not held while the next one is unpacked

    def _batches(self, names: Sequence[str]) -> Iterator[Any]:
        own = [chunk for chunk in self._chunks if chunk.path_in_schema.split(".")[0] in names]
        size = sum(chunk.total_uncompressed_size for chunk in own)
        rows = max(1, min(MOST_ROWS, BATCH_BYTES * self._group.num_rows // max(1, size)))
        yield from self._table.iter_batches(batch_size=rows, row_groups=[self._index], columns=list(names))

    def _long_pages(self, column: str) -> list[Page] | None:
        """The pages of a column when they are to be read one by one: one is long, and its file is on a local disk."""
        kinds = arrow_package().types
        kind = self._table.schema_arrow.field(column).type
        number = next((n for n, chunk in enumerate(self._chunks) if chunk.path_in_schema == column), None)
        if number is None or is_url(local(self._path)) or not (kinds.is_string(kind) or kinds.is_large_string(kind)):
            return None
        with Path(local(self._path)).open("rb") as stream:
            return long_pages(stream, self._chunks[number], self._table.schema.column(number))

    def _from_pages(self, names: Sequence[str], report: Report, apart: Apart, pages: list[Page]) -> Iterator[Row]:
        number = next(n for n, chunk in enumerate(self._chunks) if chunk.path_in_schema == apart.column)
        optional = self._table.schema.column(number).max_definition_level == 1
        rest = self._other_values([name for name in names if name != apart.column])
        with Path(local(self._path)).open("rb") as stream:
            for text in texts(stream, pages, self._chunks[number].compression, apart.folder, optional=optional):
                others = next(rest, None)
                if others is None:
                    raise ValueError("its columns are not of the same length")
                error = text if isinstance(text, UnicodeDecodeError) else others
                if isinstance(error, ValueError):
                    self._tell(report, str(error))
                    if isinstance(text, LongText):
                        text.close()
                elif isinstance(others, Mapping):
                    values = {name: text if name == apart.column else others[name] for name in names}
                    with kept_while_used(values, apart):
                        yield Row(f"row {self._first + self._done}", values)
                self._done += 1

    def _other_values(self, names: Sequence[str]) -> Iterator[Mapping[str, Any] | ValueError]:
        """The values of other columns, row by row; the error of a row that cannot be had."""
        if not names:
            yield from repeat({})
        for batch in self._batches(names):
            for index in range(batch.num_rows):
                try:
                    yield {name: batch.column(name)[index].as_py() for name in names}
                except ValueError as error:
                    yield error
