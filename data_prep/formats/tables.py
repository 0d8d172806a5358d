"""What parquet and Arrow files have in common: batches of pyarrow's become rows. Needs pyarrow (the `data` extra)."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data_prep.formats.files import File
from data_prep.formats.long_json import kept_while_used
from data_prep.long_text import LONG, long_text
from data_prep.memory import Apart
from data_prep.sources.base import Fault, Report, Unit
from ouro_megatron.errors import DataError

BATCH_BYTES = 8 << 20
"""Aimed at for the text of one batch."""
MOST_ROWS = 4096


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


def columns_of(schema: Any) -> list[Column]:
    """Columns of one of pyarrow's schemas."""
    pa = arrow_package()
    found = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
        found.append(Column(field.name, any(check(kind) for check in (*checks, pa.types.is_large_binary))))
    return found


def runs_of(file: File, sizes: Sequence[int], target_bytes: int) -> list[Unit]:
    """Consecutive pieces together, each run closed once it reaches the target."""
    units, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= target_bytes or index == len(sizes) - 1:
            units.append(file.unit(start, index + 1, held))
            start, held = index + 1, 0
    return units if len(units) > 1 else [file.unit()]


def rows_in(path: str, batch: Any, first: int, report: Report, apart: Apart | None) -> Iterator[Row]:
    """Rows of a batch of any size, few of which are in Python's memory at one time."""
    rows = max(1, min(MOST_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
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


def _has_long(batch: Any, column: str | None) -> bool:
    """Whether the text of a row is to be kept apart."""
    pa = arrow_package()
    if column is None or column not in batch.schema.names:
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
        except ValueError as error:
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


def short_reason(error: BaseException) -> str:
    """The first line of what pyarrow says."""
    return str(error).split("\n")[0].split(". Detail:")[0]
