"""Pages that are read piece by piece: the same rows as pyarrow's for what any writer makes, broken files, memory."""

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.formats import parquet_pages, tables, unpack
from data_prep.formats.files import local_file
from data_prep.formats.parquet_pages import long_pages, runs
from data_prep.formats.rows import read_rows
from data_prep.formats.thrift import read_struct
from data_prep.formats.unpack import Cursor, unpacked
from data_prep.long_text import LongText
from data_prep.memory import Apart
from data_prep.sources.base import Fault

CODECS = ["none", "snappy", "gzip", "zstd"]


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, texts, blocks and windows are cut where whole files would be needed otherwise."""
    monkeypatch.setattr(parquet_pages, "LONG_PAGE", 1000)
    for module in (parquet_pages, tables):
        monkeypatch.setattr(module, "LONG", 300)
    monkeypatch.setattr(unpack, "_BLOCK", 700)


def some_texts(seed: int, count: int, *, nulls: bool) -> list[str | None]:
    choose = random.Random(seed)
    words = ["loop ", "é", "文字", "🙂", "\n", "model ", "\u2028"]
    found: list[str | None] = []
    for _ in range(count):
        length = choose.choice([0, 1, 20, 90, 2000])
        found.append(None if nulls and choose.random() < 0.3 else "".join(choose.choices(words, k=length)))
    return found + choose.choices(found, k=count // 2)  # for dictionaries


def read(
    path: Path, wanted: tuple[str, ...], folder: Path, scheme: str = ""
) -> tuple[list[dict[str, Any]], list[Fault], int]:
    """Rows with texts as strings, faults, and how many texts were kept apart."""
    faults: list[Fault] = []
    found, apart = [], 0
    unit = replace(local_file(path).unit(), path=f"{scheme}{path}")
    for row in read_rows(unit, wanted, faults.append, {}, Apart("text", folder)):
        values = dict(row.values)
        if isinstance(values.get("text"), LongText):
            values["text"] = values["text"].whole()
            apart += 1
        found.append(values)
    return found, faults, apart


def table(texts: list[str | None], **columns: Any) -> pa.Table:
    numbers = list(range(len(texts)))
    others = [f"u{number % 7}" for number in numbers]
    return pa.table({"n": numbers, "text": pa.array(texts, **columns), "other": others})


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("nulls", [False, True])
def test_the_same_rows_as_pyarrow(tmp_path: Path, codec: str, version: str, dictionary: bool, nulls: bool) -> None:
    texts = some_texts(len(codec), 80, nulls=nulls)
    path = tmp_path / "a.parquet"
    for rows, page, limit in ((1000, 1 << 20, 1 << 20), (50, 1500, 4000), (7, 1, 1 << 20)):
        pq.write_table(
            table(texts, type=pa.large_string() if nulls else pa.string()),
            path,
            row_group_size=rows,
            compression=codec,
            data_page_version=version,
            use_dictionary=dictionary,
            data_page_size=page,
            dictionary_pagesize_limit=limit,
            write_batch_size=8,
        )
        for scheme in ("", "local://"):  # a URL's pages are read one after the other, whether one is long or not
            found, faults, apart = read(path, ("text", "n", "other"), tmp_path, scheme)
            assert found == pq.read_table(path).to_pylist() and not faults
            assert apart == sum(text is not None and len(text.encode()) > 300 for text in texts)
    assert read(path, ("text",), tmp_path)[0] == [{"text": text} for text in texts]


@pytest.mark.usefixtures("small_sizes")
def test_a_column_that_must_not_be_null(tmp_path: Path) -> None:
    texts = some_texts(3, 60, nulls=False)
    schema = pa.schema([pa.field("text", pa.string(), nullable=False)])
    pq.write_table(pa.table({"text": texts}, schema=schema), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", (), tmp_path)[0] == [{"text": text} for text in texts]


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize(
    ("column", "settings"),
    [
        (pa.array(["x" * 5000, "y"], pa.dictionary(pa.int32(), pa.string())), {}),
        (pa.array(["x" * 5000, "y"], pa.string_view()), {}),
        (pa.array(["x" * 5000, "y"]), {"compression": "brotli"}),
        (pa.array(["x" * 5000, "y"]), {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}),
        (pa.array([["x" * 5000], ["y"]]), {}),
    ],
    ids=["dictionary type", "view", "codec", "encoding", "list"],
)
def test_what_is_left_to_pyarrow(tmp_path: Path, column: pa.Array, settings: dict[str, Any]) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", **settings)
    for scheme in ("", "local://"):
        found, faults, _ = read(tmp_path / "a.parquet", (), tmp_path, scheme)
        assert found == [{"text": value} for value in column.to_pylist()] and not faults


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("scheme", ["", "local://"])
def test_a_text_that_is_no_utf8_is_one_fault(tmp_path: Path, dictionary: bool, scheme: str) -> None:
    good = [b"a" * 900, "é".encode() * 500, b"short"]
    values = [good[0], b"b" * 500 + b"\xff" + b"c" * 400, good[1], b"\xff", good[2]]
    path = tmp_path / "a.parquet"
    binary = pa.table({"text": pa.array(values), "n": list(range(5))})
    schema = pa.schema([("text", pa.string()), ("n", pa.int64())])
    strings = pa.Table.from_arrays([binary["text"].chunk(0).view(pa.string()), binary["n"]], schema=schema)
    pq.write_table(strings, path, use_dictionary=dictionary)
    found, faults, _ = read(path, (), tmp_path, scheme)
    assert found == [{"text": text.decode(), "n": n} for text, n in zip(good, (0, 2, 4), strict=True)]
    assert [fault.where for fault in faults] == ["row 1", "row 3"]
    assert all("0xff" in fault.reason and not fault.ends_unit for fault in faults)


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dictionary", [False, True])
def test_broken_bytes_never_take_other_row_groups_along(tmp_path: Path, codec: str, dictionary: bool) -> None:
    texts = [text or "" for text in some_texts(9, 90, nulls=False)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=45, compression=codec, use_dictionary=dictionary)
    metadata = pq.read_metadata(path)
    chunk = metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = path.read_bytes()
    choose = random.Random(f"{codec} {dictionary}")
    for _ in range(25):
        broken = bytearray(content)
        at = choose.randrange(chunk.total_compressed_size)
        noise = choose.randbytes(min(choose.choice([1, 8, 60]), chunk.total_compressed_size - at))
        broken[start + at : start + at + len(noise)] = noise
        path.write_bytes(broken)
        if not _footer_is_whole(path):
            continue
        found, faults, _ = read(path, (), tmp_path, choose.choice(["", "local://"]))
        assert [row["text"] for row in found[:45]] == texts[:45]
        assert [row["text"] for row in found[-45:]] == texts[90:]
        assert all(fault.where.startswith("row ") and not fault.ends_unit for fault in faults)
        if any("lost" in fault.reason or "footer" in fault.reason for fault in faults):
            assert len(found) < 135


def _footer_is_whole(path: Path) -> bool:
    try:
        return bool(pq.read_metadata(path).num_rows == 135)
    except (pa.ArrowException, OSError):
        return False


def test_short_pages_and_other_files_are_left_to_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 1000] * 9000 + ["y" * (9 << 20)]}), path, data_page_size=1 << 20)
    file = pq.ParquetFile(path)
    chunk, column = file.metadata.row_group(0).column(0), file.schema.column(0)
    with path.open("rb") as stream:
        pages = long_pages(stream, chunk, column, walk=True)
    assert isinstance(pages, list) and sum(page.unpacked_size > (8 << 20) for page in pages) == 1
    pq.write_table(pa.table({"text": [f"{n:9d}" * 300 for n in range(9000)]}), path, use_dictionary=False)
    file = pq.ParquetFile(path)
    with path.open("rb") as stream:  # 24 MB, and no page is long
        assert long_pages(stream, file.metadata.row_group(0).column(0), file.schema.column(0), walk=True) is None
    with io.BytesIO(b"\0" * 100) as nothing:
        assert long_pages(nothing, chunk, column, walk=True) is None


@pytest.mark.parametrize("width", [1, 3, 8, 11])
def test_runs_and_packed_bits(width: int) -> None:
    values = np.random.default_rng(width).integers(0, 1 << width, 24)
    bits = (values[:, None] >> np.arange(width)) & 1
    packed = bytes([3 << 1 | 1]) + np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()
    repeated = bytes([0x80 | (300 << 1) & 0x7F, (300 << 1) >> 7]) + int(values[0]).to_bytes((width + 7) // 8, "little")
    whole = np.concatenate([values, np.full(300, values[0]), values])
    assert np.array_equal(runs(packed + repeated + packed, width, 348), whole)
    assert np.array_equal(runs(packed + repeated + packed, width, 341), whole[:341])
    for cut in (b"", packed[:-1], packed + repeated[:1], packed + b"\0"):
        with pytest.raises(ValueError, match="cut off"):
            runs(cut, width, 30)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block", [13, 100, 1 << 20])
def test_unpacked_in_pieces(monkeypatch: pytest.MonkeyPatch, codec: str, block: int) -> None:
    if codec == "snappy" and "SNAPPY" not in unpack.UNPACKERS:
        pytest.skip("the C extension is not built")
    monkeypatch.setattr(unpack, "_BLOCK", block)
    choose = random.Random(block)
    noise, words = choose.randbytes(3000), b"loops " * 40
    for data in (b"", b"a", b"ab" * 900, noise, words + noise[:900] + words):
        packed = data if codec == "none" else pa.compress(data, codec, asbytes=True)
        name = "UNCOMPRESSED" if codec == "none" else codec.upper()
        stream = io.BytesIO(b"before" + packed + b"behind")
        assert b"".join(unpacked(stream, 6, len(packed), name, len(data))) == data
        cursor = Cursor(unpacked(stream, 6, len(packed), name, len(data)))
        assert cursor.exactly(len(data) // 3) + b"".join(cursor.blocks(len(data) // 2)) + cursor.rest() == data
        for size, count in ((len(packed), len(data) + 1), (len(packed), len(data) - 1), (len(packed) - 1, len(data))):
            if count >= 0 and size >= 0 and not (size < len(packed) and not data):
                with pytest.raises(ValueError, match=r"missing|more than|broken"):
                    list(unpacked(stream, 6, size, name, count))
        with pytest.raises(ValueError, match="missing"):
            Cursor(iter([data])).exactly(len(data) + 1)


@pytest.mark.skipif("SNAPPY" not in unpack.UNPACKERS, reason="the C extension is not built")
def test_snappy_that_no_writer_makes() -> None:
    def whole(elements: bytes, size: int) -> bytes:
        packed = bytes([size]) + elements
        return b"".join(unpacked(io.BytesIO(packed), 0, len(packed), "SNAPPY", size))

    letters = bytes([2 << 2]) + b"abc"
    assert whole(letters + bytes([(4 - 4) << 2 | 1, 3]), 7) == b"abcabca"  # a copy that overlaps itself
    assert whole(letters + bytes([(5 - 1) << 2 | 2, 1, 0]), 8) == b"abcccccc"
    assert whole(letters + bytes([(2 - 1) << 2 | 3, 2, 0, 0, 0]), 5) == b"abcbc"
    assert whole(bytes([61 << 2, 2, 0]) + b"abc", 3) == b"abc"  # a length in bytes of its own
    for broken in (
        bytes([(5 - 1) << 2 | 2, 1, 0]),
        letters + bytes([(5 - 1) << 2 | 2, 4, 0]),
        letters + bytes([(5 - 1) << 2 | 2, 0, 0]),
        letters + bytes([(5 - 1) << 2 | 3, 1, 0]),
        bytes([9 << 2]) + b"abc",
    ):
        with pytest.raises(ValueError, match="broken snappy"):
            whole(broken, 8)


def test_a_struct_with_every_kind_of_field() -> None:
    inner = bytes([0x15, 0x09, 0])  # field 1, i32: -5
    fields = [
        (0x11, b""),  # true
        (0x12, b""),  # false
        (0x13, b"\x07"),
        (0x16, b"\xac\x02"),  # 150
        (0x17, b"\0" * 8),
        (0x18, b"\x03abc"),
        (0x19, b"\x25\x02\x04"),
        (0x1B, b"\x01\x85\x01ab\x02"[:1] + b"\x58\x02\x01q"),
        (0x1C, inner),
        (0x29, b"\x11\x01"),
    ]
    data = b"".join(bytes([head]) + value for head, value in fields) + b"\x05\x28\x02\0"
    stream = io.BytesIO(data + b"rest")
    assert read_struct(stream) == {
        1: True, 2: False, 3: None, 4: 150, 5: None, 6: None, 7: None, 8: None, 9: {1: -5}, 11: None, 20: 1,
    }  # fmt: skip
    assert stream.read() == b"rest"
    for cut in (b"", data[:-1], b"\x1d", b"\x1c" * 20):
        with pytest.raises(ValueError, match="no page header"):
            read_struct(io.BytesIO(cut))
