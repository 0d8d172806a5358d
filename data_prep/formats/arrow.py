"""Arrow files and streams, as `datasets` saves them: read batch by batch, with only the columns that are asked for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data_prep.formats.files import File, Options, is_url, open_file
from data_prep.formats.tables import Column, Row, arrow_package, columns_of, rows_in, runs_of, short_reason
from data_prep.memory import Apart
from data_prep.sources.base import Fault, Report, Unit

_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_ARROW_FILE = b"ARROW1"


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
        raise ValueError(f"no whole Arrow file: {short_reason(error)}") from error


def arrow_columns(file: File, options: Options) -> list[Column] | None:
    """Columns of a file; None when it is empty. Raises ValueError when it cannot be read."""
    if file.size == 0:
        raise ValueError("the file is empty")
    with _arrow_bytes(file.path, options) as source:
        return columns_of(_open_arrow(source)[0].schema)


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
    return runs_of(file, [file.size // max(1, batches)] * batches, target_bytes)


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
                    yield from rows_in(unit.path, batch.select(names), first, report, apart)
                first += batch.num_rows
            if count is None and not _has_end_mark(source):
                report(Fault(unit.path, f"row {first}", "the stream has no end mark: it may have been cut off", True))
    except (ValueError, pa.ArrowException, OSError) as error:
        report(Fault(unit.path, f"row {first}", short_reason(error), ends_unit=True))


def _has_end_mark(source: Any) -> bool:
    """pyarrow takes the end of the file for the end of the stream."""
    size = source.size()
    if size < len(_STREAM_END):
        return False
    source.seek(size - len(_STREAM_END))
    return source.read(len(_STREAM_END)) == _STREAM_END
