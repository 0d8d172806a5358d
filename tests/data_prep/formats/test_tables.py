"""Parquet and Arrow: cut files, odd row groups, columns that differ, memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.fixtures.writers import write_parquet, write_saved_dataset
from data_prep.formats import tables
from data_prep.formats.files import local_file
from data_prep.formats.rows import columns_of, read_rows, split_file
from data_prep.long_text import LongText
from data_prep.memory import Apart
from data_prep.sources.base import Fault

ROWS = [{"text": f"document {number} " * 5, "n": number} for number in range(30)]


def read(path: Path, wanted: tuple[str, ...] = (), target: int = 1 << 30) -> tuple[list[dict[str, Any]], list[Fault]]:
    faults: list[Fault] = []
    units = split_file(local_file(path), target, {})
    return [row.values for unit in units for row in read_rows(unit, wanted, faults.append, {})], faults


def test_columns_are_projected_and_row_groups_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group=4)
    assert read(path) == (ROWS, [])
    assert read(path, ("n", "absent"))[0] == [{"n": row["n"]} for row in ROWS]
    units = split_file(local_file(path), 500, {})
    assert len(units) > 2 and units[0].start == 0 and units[-1].stop == pq.ParquetFile(path).num_row_groups
    assert [before.stop for before in units[:-1]] == [after.start for after in units[1:]]
    assert read(path, target=500) == (ROWS, [])


@pytest.mark.parametrize("keep", [0, 3, 50, 0.3, 0.9, -1])
def test_cut_parquet_is_one_fault(tmp_path: Path, keep: float) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else int(keep)])
    found, faults = read(path)
    assert not found and len(faults) == 1 and faults[0].ends_unit and "parquet" in faults[0].reason
    with pytest.raises(ValueError, match="parquet"):
        columns_of(local_file(path), {})


def test_broken_row_group_does_not_take_the_others_along(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group=10)
    metadata = pq.read_metadata(path)
    column = metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found, faults = read(path)
    assert [row["n"] for row in found] == [*range(10), *range(20, 30)]
    assert len(faults) == 1 and not faults[0].ends_unit
    assert faults[0].where == "row 10" and "rows 10 to 19 are lost" in faults[0].reason


def test_row_groups_that_are_empty_or_none(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS, empty_group=True)
    assert read(path, target=1) == (ROWS, [])
    none = tmp_path / "b.parquet"
    pq.ParquetWriter(none, pa.schema([("text", pa.string())])).close()
    assert read(none) == ([], []) and columns_of(local_file(none), {}) is None


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": values}), path)
    found, faults = read(path)
    assert found == [{"text": "good"}, {"text": "fine"}]
    assert [fault.where for fault in faults] == ["row 1"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_every_cut_of_an_arrow_file_is_noticed(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.arrow"
    table = pa.Table.from_pylist(ROWS)
    opened = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert read(path) == (ROWS, []) and read(path, target=100) == (ROWS, [])
    assert len(split_file(local_file(path), 100, {})) > 1
    content = path.read_bytes()
    for size in range(0, len(content), 5):
        path.write_bytes(content[:size])
        found, faults = read(path)
        assert found == ROWS[: len(found)]
        assert faults and faults[-1].ends_unit


def test_saved_dataset_reads_its_arrow_files_only(tmp_path: Path) -> None:
    paths = write_saved_dataset(tmp_path, ROWS, 3)
    assert [row for path in paths for row in read(path)[0]] == ROWS


_MEMORY = """
import resource, sys
from pathlib import Path
from data_prep.formats.files import local_file
from data_prep.formats.rows import read_rows
unit = local_file(Path(sys.argv[1])).unit()
list(zip(read_rows(unit, ("text",), print, {}), range(1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(row.values["text"]) for row in read_rows(unit, ("text",), print, {}))
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_huge_row_group_is_never_held(tmp_path: Path) -> None:
    """One row group of 240 MB of text, and as much in another column, is read within a few batches of memory."""
    path = tmp_path / "a.parquet"
    text = [f"{number:08d}" * 2500 for number in range(1000)]
    schema = pa.schema([("text", pa.string()), ("other", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        table = pa.table({"text": text * 12, "other": text * 12})
        writer.write_table(table, row_group_size=12_000)
    assert pq.read_metadata(path).num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(path)], capture_output=True, text=True, check=True)
    characters, grown = map(int, done.stdout.split())
    assert characters == 240_000_000
    assert grown < 120


PLAIN_LAYOUTS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


@pytest.mark.parametrize("layout", [*PLAIN_LAYOUTS, pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("start", [0, 2])
def test_a_long_value_is_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: pa.DataType, start: int
) -> None:
    monkeypatch.setattr(tables, "LONG", 5)
    texts = ["a", "long enough é", None, "", "short", "the longest of them all", "x" * 6, "é" * 3]
    column = pa.array([text if text is None or layout not in PLAIN_LAYOUTS[2:] else text.encode() for text in texts])
    batch = pa.record_batch({"text": column.cast(layout)}).slice(start)
    found = []
    for row in tables._rows_of("file", batch, 0, lambda fault: pytest.fail(fault.reason), Apart("text", tmp_path)):
        value = row.values["text"]
        content = value.whole() if isinstance(value, LongText) else value
        found.append(content.decode() if isinstance(content, bytes) else content)
        long = found[-1] is not None and len(found[-1].encode()) > 5
        assert isinstance(value, LongText) == (long and layout in PLAIN_LAYOUTS)
    assert found == texts[start:]
