"""Rows of whatever file: JSON lines, parquet or Arrow, told apart by the name of the file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import gettempdir

from data_prep.formats.arrow import arrow_columns, read_arrow, split_arrow
from data_prep.formats.compression import bare_name, codec_of
from data_prep.formats.files import File, Options, find_files
from data_prep.formats.gzip_parts import GzipParts
from data_prep.formats.lines import fields_of, read_lines, row_of, split_lines_file
from data_prep.formats.long_json import kept_while_used
from data_prep.formats.parquet import parquet_columns, read_parquet, split_parquet
from data_prep.formats.tables import Column, Row
from data_prep.memory import Apart
from data_prep.sources.base import Fault, Report, Unit

_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
JSON_FILES = "**/*.{jsonl,json,ndjson}{,.gz,.zst,.zstd,.xz,.bz2}"


def format_of(path: str) -> str:
    """ "json", "parquet" or "arrow"; a name that says nothing is taken for JSON lines."""
    name = bare_name(path.lower())
    return next((kind for suffix, kind in _FORMATS.items() if name.endswith(suffix)), "json")


def split_file(file: File, target_bytes: int, options: Options) -> list[Unit]:
    """Units of about `target_bytes` where the format can be entered in the middle, else the file."""
    kind = format_of(file.path)
    if kind == "parquet":
        return split_parquet(file, target_bytes, options)
    if kind == "arrow":
        return split_arrow(file, target_bytes, options)
    if codec_of(file.path) == "gzip":
        return GzipParts(file.path, (file,), options).units(target_bytes, file.stamp)
    return split_lines_file(file, target_bytes, options)


def columns_of(file: File, options: Options) -> list[Column] | None:
    """Columns of a table, fields of a JSON file's first readable line; None when it holds no rows.

    Raises ValueError when the file cannot be read.
    """
    kind = format_of(file.path)
    if kind == "parquet":
        return parquet_columns(file, options)
    if kind == "arrow":
        return arrow_columns(file, options)
    return _first_fields(file, options)


def _first_fields(file: File, options: Options) -> list[Column] | None:
    reasons: list[str] = []
    scratch = Path(gettempdir())
    for line in read_lines(file.unit(), lambda fault: reasons.append(fault.reason), options, scratch):
        try:
            found = fields_of(line)
        except ValueError as error:
            reasons.append(str(error))
            if len(reasons) > 100:
                break
            continue
        if found is not None:
            return [Column(name, isinstance(value, str)) for name, value in found.items()]
    if reasons:
        raise ValueError(reasons[0])
    return None


def read_rows(
    unit: Unit, wanted: Sequence[str], report: Report, options: Options, apart: Apart | None = None
) -> Iterator[Row]:
    """Rows of a unit with at least those of the `wanted` columns that exist; bad ones are reported.

    `apart`: a long text of its column is a LongText, gone when the next row is asked for; None: all are strings, of any
    length.
    """
    kind = format_of(unit.path)
    if kind == "parquet":
        yield from read_parquet(unit, wanted, report, options, apart)
    elif kind == "arrow":
        yield from read_arrow(unit, wanted, report, options, apart)
    else:
        yield from _json_rows(unit, report, options, apart)


def _json_rows(unit: Unit, report: Report, options: Options, apart: Apart | None) -> Iterator[Row]:
    scratch = None if apart is None or apart.column is None else apart.folder
    memory = None if apart is None or apart.column is not None else apart.memory
    if unit.start > 0 and codec_of(unit.path) == "gzip":
        parts = GzipParts(unit.path, (find_files("", unit.path, "", options)[0],), options)
        lines = parts.lines(unit, report, scratch=scratch, memory=memory)
    else:
        lines = read_lines(unit, report, options, scratch, memory)
    for line in lines:
        try:
            found = row_of(line, apart)
        except (ValueError, RecursionError) as error:
            report(Fault(unit.path, line.where, str(error)))
            continue
        if found is not None:
            with kept_while_used(found, apart):
                yield Row(line.where, found)
