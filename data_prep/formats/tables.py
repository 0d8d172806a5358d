"""Parquet and Arrow files, read in small batches with only the columns that are asked for.

A row group may hold gigabytes, so none is ever read whole. Needs pyarrow (the `data` extra).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from data_prep.formats.files import File, Options, is_url, open_file
from data_prep.formats.long_json import Apart, kept_while_used
from data_prep.long_text import LONG, long_text
from data_prep.sources.base import Fault, Report, Unit
from ouro_megatron.errors import DataError

_BATCH_BYTES = 8 << 20
"""Aimed at for the text of one batch."""
_MOST_ROWS = 4096
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"


class Row(NamedTuple):
    where: str
    values: dict[str, Any]


class Column(NamedTuple):
    name: str
    is_text: bool
    """Holds strings (or bytes); other columns hold numbers, lists or structs."""


def arrow_package() -> Any:
    """pyarrow. Raises DataError naming the extra that brings it."""
    # Asked when it is first imported. The other pools keep what a long value took, for the rest of the process.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            'parquet and Arrow files need pyarrow; install it with: pip install "ouro-megatron[data]"'
        ) from error
    return pyarrow


def _columns_of(schema: Any) -> list[Column]:
    pa = arrow_package()
    found = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
        found.append(Column(field.name, any(check(kind) for check in (*checks, pa.types.is_large_binary))))
    return found


# --- parquet ---------------------------------------------------------------------------------------------------------


def parquet_columns(file: File, options: Options) -> list[Column] | None:
    """Columns of a file; None when it holds no rows. Raises ValueError when it cannot be read."""
    with _parquet(file.path, options) as table:
        return _columns_of(table.schema_arrow) if table.metadata.num_rows else None


@contextmanager
def _parquet(path: str, options: Options) -> Iterator[Any]:
    """Raises ValueError when the file has no valid footer."""
    pa = arrow_package()
    with open_file(path, options) as stream:
        try:
            # Without pre_buffer and with a buffer, column chunks are streamed instead of held.
            table = pa.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"no whole parquet file: {_short(error)}") from error
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
    return _runs(file, sizes, target_bytes)


def _stored(group: Any) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))


def _runs(file: File, sizes: Sequence[int], target_bytes: int) -> list[Unit]:
    """Consecutive pieces together, each run closed once it reaches the target."""
    units, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= target_bytes or index == len(sizes) - 1:
            units.append(file.unit(start, index + 1, held))
            start, held = index + 1, 0
    return units if len(units) > 1 else [file.unit()]


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
                yield from _row_group(unit.path, table, index, first, names, report, apart)
                first += metadata.row_group(index).num_rows
    except ValueError as error:
        report(Fault(unit.path, "byte 0", str(error), ends_unit=True))


def _row_group(
    path: str, table: Any, index: int, first: int, names: Sequence[str], report: Report, apart: Apart | None
) -> Iterator[Row]:
    pa = arrow_package()
    group = table.metadata.row_group(index)
    rows = group.num_rows
    if rows == 0:
        return
    bytes_a_row = max(1, group.total_byte_size // rows)
    batch_rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // bytes_a_row))
    done = 0
    try:
        batches = table.iter_batches(batch_size=batch_rows, row_groups=[index], columns=list(names))
        while (batch := next(batches, None)) is not None:
            yield from _slices(path, batch, first + done, report, apart)
            done += batch.num_rows
            del batch  # not held while the next one is unpacked
    except (pa.ArrowException, OSError) as error:
        reason = f"row group {index}: {_short(error)}; its rows {first + done} to {first + rows - 1} are lost"
        report(Fault(path, f"row {first + done}", reason))
        return
    if done != rows:
        report(Fault(path, f"row {first + done}", f"row group {index} holds {done} rows, its footer says {rows}"))


def _slices(path: str, batch: Any, first: int, report: Report, apart: Apart | None) -> Iterator[Row]:
    """Rows of a batch of any size, few of which are in Python's memory at one time."""
    rows = max(1, min(_MOST_ROWS, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        yield from _rows_of(path, batch.slice(start, rows), first + start, report, apart)


def _rows_of(path: str, batch: Any, first: int, report: Report, apart: Apart | None) -> Iterator[Row]:
    """Rows of one batch; one whose text is not UTF-8 is reported."""
    names = batch.schema.names
    if apart is not None and _has_long(batch, apart.column):
        yield from _one_by_one(path, batch, first, report, apart)
        return
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (UnicodeDecodeError, ValueError):
        yield from _one_by_one(path, batch, first, report, None)
        return
    for index, values in enumerate(zip(*columns, strict=True)):
        yield Row(f"row {first + index}", dict(zip(names, values, strict=True)))


def _has_long(batch: Any, column: str) -> bool:
    """Whether the text of a row is to be kept apart."""
    pa = arrow_package()
    if column not in batch.schema.names:
        return False
    try:
        longest = pa.compute.max(pa.compute.binary_length(batch.column(column))).as_py()
    except pa.ArrowNotImplementedError:  # no plain strings
        return False
    return longest is not None and longest > LONG


def _one_by_one(path: str, batch: Any, first: int, report: Report, apart: Apart | None) -> Iterator[Row]:
    for index in range(batch.num_rows):
        try:
            values = {name: _value(batch, name, index, apart) for name in batch.schema.names}
        except (UnicodeDecodeError, ValueError) as error:
            report(Fault(path, f"row {first + index}", str(error)))
            continue
        with kept_while_used(values, apart):
            yield Row(f"row {first + index}", values)


def _value(batch: Any, name: str, index: int, apart: Apart | None) -> Any:
    column = batch.column(name)
    content = _bytes_of(column, index) if apart is not None and name == apart.column else None
    if apart is None or content is None or len(content) <= LONG:
        return column[index].as_py()
    return long_text((bytes(content[at : at + LONG]) for at in range(0, len(content), LONG)), apart.folder)


def _bytes_of(column: Any, index: int) -> memoryview | None:
    """A value of a column of strings, where it lies: pyarrow's scalars are copies. None for null and other layouts."""
    pa = arrow_package()
    checks = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    wide = [check(column.type) for check in checks]
    _, offsets, values = column.buffers() if any(wide) else (None, None, None)
    if offsets is None or values is None or column.slice(index, 1).null_count:
        return None
    bounds = memoryview(offsets).cast("q" if any(wide[2:]) else "i")
    return memoryview(values)[bounds[column.offset + index] : bounds[column.offset + index + 1]]


# --- arrow -----------------------------------------------------------------------------------------------------------


@contextmanager
def _arrow_bytes(path: str, options: Options) -> Iterator[Any]:
    """Mapped into memory when it is local, so that batches are read only where they are used."""
    pa = arrow_package()
    if is_url(path):
        with open_file(path, options) as stream:
            yield pa.PythonFile(stream, mode="r")
        return
    with open_file(path, options):
        pass
    with pa.memory_map(path, "r") as mapped:
        yield mapped


def _open_arrow(source: Any) -> tuple[Any, int | None]:
    """A reader, and the number of batches where the format says it. Raises ValueError when it is no Arrow file."""
    pa = arrow_package()
    try:
        head = source.read(len(_ARROW_FILE))
        source.seek(0)
        if head == _ARROW_FILE:
            reader = pa.ipc.open_file(source)
            return reader, reader.num_record_batches
        return pa.ipc.open_stream(source), None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"no whole Arrow file: {_short(error)}") from error


def arrow_columns(file: File, options: Options) -> list[Column] | None:
    """Columns of a file; None when it is empty. Raises ValueError when it cannot be read."""
    if file.size == 0:
        raise ValueError("the file is empty")
    with _arrow_bytes(file.path, options) as source:
        return _columns_of(_open_arrow(source)[0].schema)


def split_arrow(file: File, target_bytes: int, options: Options) -> list[Unit]:
    """Runs of record batches of about `target_bytes`; a remote stream, which has no index, is one unit."""
    if file.size <= target_bytes or is_url(file.path):
        return [file.unit()]
    try:
        with _arrow_bytes(file.path, options) as source:
            reader, batches = _open_arrow(source)
            if batches is None:  # walking over a mapped stream reads little but the batches' headers
                batches = sum(1 for _ in _batches(reader, None))
    except Exception:  # reading the unit reports it
        return [file.unit()]
    return _runs(file, [file.size // max(1, batches)] * batches, target_bytes)


def _batches(reader: Any, count: int | None) -> Iterator[Any]:
    if count is not None:
        for index in range(count):
            yield reader.get_batch(index)
        return
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return


def read_arrow(
    unit: Unit, wanted: Sequence[str], report: Report, options: Options, apart: Apart | None = None
) -> Iterator[Row]:
    """Rows of the unit's record batches with those of the `wanted` columns that exist; () wants all."""
    pa = arrow_package()
    first = 0
    try:
        if unit.size == 0:
            raise ValueError("the file is empty")
        with _arrow_bytes(unit.path, options) as source:
            reader, count = _open_arrow(source)
            names = [name for name in reader.schema.names if not wanted or name in wanted]
            for index, batch in enumerate(_batches(reader, count)):
                if unit.stop is not None and index >= unit.stop:
                    return
                if index >= unit.start:
                    yield from _slices(unit.path, batch.select(names), first, report, apart)
                first += batch.num_rows
            if count is None and not _has_end_mark(source):
                report(Fault(unit.path, f"row {first}", "the stream has no end mark: it may have been cut off", True))
    except (ValueError, pa.ArrowException, OSError) as error:
        report(Fault(unit.path, f"row {first}", _short(error), ends_unit=True))


def _has_end_mark(source: Any) -> bool:
    """pyarrow takes the end of the file for the end of the stream."""
    size = source.size()
    if size < len(_STREAM_END):
        return False
    source.seek(size - len(_STREAM_END))
    return source.read(len(_STREAM_END)) == _STREAM_END


def _short(error: BaseException) -> str:
    return str(error).split("\n")[0].split(". Detail:")[0]
