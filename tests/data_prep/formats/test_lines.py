"""Line files: every compression, every cut, lines of every kind, ranges of plain files."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.fixtures.writers import write_zstd
from data_prep.formats import lines
from data_prep.formats.compression import Damaged, inflate_pieces
from data_prep.formats.files import byte_ranges, local_file
from data_prep.formats.lines import cut, parse_object, read_lines, split_lines_file
from data_prep.sources.base import Fault, Unit


def _zstd_frames(content: bytes) -> bytes:
    step = len(content) // 3 + 1
    return b"".join(zstandard.compress(content[start : start + step]) for start in range(0, len(content), step))


CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :]),
    "zst": _zstd_frames,
    "zstd": zstandard.compress,
    "xz": lambda content: lzma.compress(content[:999]) + lzma.compress(content[999:]),
    "bz2": bz2.compress,
}
ROWS = [{"text": f"line {number} \u2028 of \u0085 pages \u2029 and\rmore 🙂" * 3} for number in range(40)]
CONTENT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path, start: int = 0, stop: int | None = None) -> tuple[list[bytes], list[Fault]]:
    faults: list[Fault] = []
    unit = Unit(str(path), path.stat().st_size, start, stop)
    return [line.data for line in read_lines(unit, faults.append, {})], faults


@pytest.mark.parametrize("suffix", CODECS)
def test_all_members_and_odd_line_ends(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(CODECS[suffix](CONTENT))
    found, faults = read(path)
    assert [json.loads(line) for line in found] == ROWS and not faults


@pytest.mark.parametrize("suffix", CODECS)
def test_every_cut_is_noticed(tmp_path: Path, suffix: str) -> None:
    """At each place where a file can be cut: the first lines and a fault that says so. Never less in silence.

    Only between two members does a cut look like an end; then what came before it is read whole.
    """
    whole = CODECS[suffix](CONTENT)
    path = tmp_path / f"a.jsonl.{suffix}"
    wanted = CONTENT.rstrip(b"\n").split(b"\n")
    silent = 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found, faults = read(path)
        if faults:
            assert len(faults) == 1 and faults[0].ends_unit
            assert found == wanted[: len(found)]
        else:
            silent += 1
            assert CONTENT.startswith(b"\n".join(found)) and len(found) > 2
    assert silent == {"gz": 1, "zst": 2, "xz": 1}.get(suffix, 0)


def test_cut_zstd_is_no_shorter_file(tmp_path: Path) -> None:
    path = write_zstd(tmp_path / "a.jsonl.zstd", CONTENT)
    path.write_bytes(path.read_bytes()[:-7])
    found, faults = read(path)
    assert 0 < len(found) < len(ROWS)
    assert faults[0].path == str(path) and "cut off" in faults[0].reason and "byte" in faults[0].where
    with zstandard.open(path, "rb") as stream:  # the library itself says nothing
        assert stream.read()


@pytest.mark.parametrize("suffix", CODECS)
def test_flipped_byte_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    content = bytearray(CODECS[suffix](CONTENT))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found, faults = read(path)
    if suffix.startswith("zst"):  # frames carry no checksum unless asked for: other lines, or a fault
        assert faults or found != CONTENT.rstrip(b"\n").split(b"\n")
    else:
        assert faults and faults[0].ends_unit


def test_empty_and_misnamed_files(tmp_path: Path) -> None:
    empty = tmp_path / "a.jsonl.zst"
    empty.write_bytes(b"")
    assert read(empty)[1][0].reason == "the file is empty"
    page = tmp_path / "b.jsonl.gz"
    page.write_bytes(b"<html>404</html>")
    assert "no gzip data" in read(page)[1][0].reason
    inflated = tmp_path / "c.jsonl.gz"  # some downloaders inflate and keep the name
    inflated.write_bytes(CONTENT)
    assert len(read(inflated)[0]) == len(ROWS)
    disguised = tmp_path / "d.jsonl"
    disguised.write_bytes(gzip.compress(CONTENT))
    assert len(read(disguised)[0]) == len(ROWS)
    assert split_lines_file(local_file(disguised), 50, {}) == [local_file(disguised).unit()]


def test_skippable_frames_and_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skippable = bytes([0x50, 0x2A, 0x4D, 0x18]) + (4).to_bytes(4, "little") + b"size"
    path.write_bytes(skippable + zstandard.compress(CONTENT))
    assert len(read(path)[0]) == len(ROWS)
    padded = tmp_path / "b.jsonl.gz"
    padded.write_bytes(gzip.compress(CONTENT) + b"\0" * 512)
    found, faults = read(padded)
    assert len(found) == len(ROWS) and not faults


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=9), max_size=12), st.integers(1, 40), st.booleans())
def test_ranges_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], target: int, end: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"{" + b"\n".join(parts) + (b"\n" if end else b""))
    content = path.read_bytes()
    found = [line for unit in byte_ranges(local_file(path), target) for line in read(path, unit.start, unit.stop)[0]]
    wanted = content.split(b"\n")
    if wanted[-1] == b"":
        wanted.pop()
    assert found == wanted


def test_places_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\n\ncd\n")
    unit = Unit(str(path), 7)
    assert [line.where for line in read_lines(unit, list[Fault]().append, {})] == [
        "line 1, byte 0",
        "line 2, byte 3",
        "line 3, byte 4",
    ]
    later = Unit(str(path), 4, 3, 7)
    assert [line.where for line in read_lines(later, list[Fault]().append, {})] == ["byte 3", "byte 4"]


def test_line_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 10)
    faults: list[Fault] = []
    pieces = [b"ab\n01234", b"56789", b"xyz\ncd", b"\n", b"0123456789abc"]
    assert [line.data for line in cut(Unit("p", 0), pieces, faults.append)] == [b"ab", b"cd"]
    assert [fault.where for fault in faults] == ["byte 3", "byte 20"]


def test_a_line_that_is_too_long_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the range it begins in, however many ranges it reaches through."""
    monkeypatch.setattr(lines, "LONGEST_LINE", 10)
    monkeypatch.setattr(lines, "_PIECE", 8)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\n" + b"x" * 100 + b"\ncd\n" + b"y" * 50 + b"\nef")
    size = path.stat().st_size
    for step in (1, 2, 7, 30, 103, 104, 105, 1000):
        faults: list[Fault] = []
        found: list[bytes] = []
        for start in range(0, size, step):
            unit = Unit(str(path), step, start, min(size, start + step))
            found += [line.data for line in read_lines(unit, faults.append, {})]
        assert found == [b"ab", b"cd", b"ef"] and [fault.where for fault in faults] == ["byte 3", "byte 107"]


def test_long_line_over_many_pieces() -> None:
    """A document of 20 MB on one line, in pieces of 1 kB: joined once, not once a piece."""
    piece = b"x" * 1024
    content = [b'{"text": "', *[piece] * 20_000, b'"}\n', b"{}\n"]
    found = list(cut(Unit("p", 0), content, list[Fault]().append))
    assert [len(line.data) for line in found] == [20_000 * 1024 + 12, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a\xff"}', "not UTF-8 at byte 11"),
        (b'{"text": ', "not JSON"),
        (b"[1, 2]", "array"),
        (b"7", "int"),
        (b"[" * 100_000, "not JSON|nested"),
    ],
)
def test_bad_lines(line: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_object(line)


@pytest.mark.parametrize("fast", [True, False])
def test_both_json_readers_agree(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(lines, "orjson", None)
    assert parse_object(b'{"text": "a\\u2028b", "score": NaN}')["text"] == "a\u2028b"  # type: ignore[index]
    assert parse_object(b'\xef\xbb\xbf{"text": "a"}') == {"text": "a"}
    assert parse_object(b"  \r") is None
    assert parse_object(b'{"n": 123456789012345678901234567890}')
    with pytest.raises(ValueError, match="not JSON"):
        parse_object(b"{'text': 1}")


def test_damage_names_its_place() -> None:
    with pytest.raises(Damaged) as caught:
        list(inflate_pieces([gzip.compress(b"abc"), b"rubbish"], "gzip"))
    assert caught.value.at == len(gzip.compress(b"abc"))
