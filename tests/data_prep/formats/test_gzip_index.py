"""Entering a gzip stream in the middle: the same lines as from its beginning, whatever the cut of stream and parts."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from data_prep.fixtures.writers import write_bytes
from data_prep.formats.files import local_file
from data_prep.formats.gzip_index import index_file
from data_prep.formats.gzip_parts import GzipParts
from data_prep.sources.base import Fault, Unit
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all, source_of

SPACING = 1 << 16


def content_of(lines: int) -> bytes:
    pick = random.Random(lines)
    letters = "abcdefghij klmnop深度循环"
    rows = [{"text": "".join(pick.choices(letters, k=pick.randrange(1, 900)))} for _ in range(lines)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CONTENT = content_of(2000)
MEMBERS = {
    "one member": gzip.compress(CONTENT, 6),
    "stored blocks": gzip.compress(CONTENT, 0),
    "three members": b"".join(gzip.compress(CONTENT[at : at + 400_000]) for at in range(0, len(CONTENT), 400_000)),
    "padded": gzip.compress(CONTENT) + b"\0" * 300,
}


def parts_of(folder: Path, stream: bytes, count: int = 3) -> GzipParts:
    step = -(-len(stream) // count)
    files = [
        local_file(write_bytes(folder / f"zh_cc.jsonl.gz.part{number + 1:02d}", stream[number * step :][:step]))
        for number in range(count)
    ]
    return GzipParts(str(folder / "zh_cc.jsonl.gz"), tuple(files), {})


def lines_of(parts: GzipParts, units: list[Unit]) -> tuple[list[bytes], list[Fault]]:
    faults: list[Fault] = []
    return [line.data for unit in units for line in parts.lines(unit, faults.append)], faults


@pytest.mark.parametrize("form", MEMBERS)
def test_ranges_give_each_line_once(tmp_path: Path, form: str) -> None:
    parts = parts_of(tmp_path, MEMBERS[form])
    told: list[int] = []
    index = parts.make_index(told.append, SPACING)
    assert index.content == len(CONTENT) and told and len(index.points) > 3
    units = parts.units(40_000)
    assert len(units) > 3 and abs(sum(unit.size for unit in units) - parts.size) < len(units)
    assert lines_of(parts, units) == (CONTENT.rstrip(b"\n").split(b"\n"), [])
    # Any other place is good too, such as one in the middle of a line.
    for start in (1, 99_999, 400_000, 400_001, len(CONTENT) - 1):
        one = [Unit(parts.path, 1, 0, start), Unit(parts.path, 1, start, len(CONTENT))]
        assert lines_of(parts, one) == (CONTENT.rstrip(b"\n").split(b"\n"), [])


def test_parts_of_another_size_need_another_index(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, MEMBERS["one member"])
    parts.make_index(list[int]().append, SPACING)
    grown = parts_of(tmp_path, MEMBERS["one member"] + gzip.compress(b"{}\n"))
    with pytest.raises(DataError, match="made for other parts"):
        grown.units(1)
    index_file(parts.path, None).write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be read"):
        parts_of(tmp_path, MEMBERS["one member"]).units(1)


def damaged(stream: bytes) -> bytes:
    """Bytes of a stored block changed: zlib inflates them, the checksum is wrong."""
    return stream[:500_000] + b"xx" + stream[500_002:]


@pytest.mark.parametrize(
    "stream",
    [
        MEMBERS["one member"][:-50_000],
        MEMBERS["one member"][:-9],
        MEMBERS["three members"][:-2000],
        damaged(MEMBERS["stored blocks"]),
        b"no gzip at all" * 100,
    ],
)
def test_a_damaged_stream_gets_no_index(tmp_path: Path, stream: bytes) -> None:
    parts = parts_of(tmp_path, stream)
    with pytest.raises(DataError, match=r"zh_cc\.jsonl\.gz"):
        parts.make_index(list[int]().append, SPACING)
    assert parts.index() is None


def test_damage_found_later_names_the_part(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, MEMBERS["one member"])
    parts.make_index(list[int]().append, SPACING)
    path = Path(parts.parts[1].path)
    content = bytearray(path.read_bytes())
    content[1000:9000] = b"\xff" * 8000
    path.write_bytes(content)
    found, faults = lines_of(parts, parts.units(40_000))
    assert len(found) < 2000 and any("part02" in fault.reason and fault.ends_unit for fault in faults)


def test_map_cc_and_plain_gz_use_their_index(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "map", MEMBERS["one member"], 36)
    settings = {"kind": "map_cc", "path": str(tmp_path / "map")}
    whole, _ = read_all(settings)
    assert len(source_of(settings).units(40_000)) == 1
    parts.make_index(list[int]().append, SPACING)
    assert len(source_of(settings).units(40_000)) > 3
    assert read_all(settings, 40_000) == (whole, [])
    path = write_bytes(tmp_path / "web" / "a.jsonl.gz", MEMBERS["three members"])
    alone = {"kind": "jsonl", "path": str(tmp_path / "web")}
    assert len(source_of(alone).units(40_000)) == 1
    GzipParts(str(path), (local_file(path),), {}).make_index(list[int]().append, SPACING)
    assert len(source_of(alone).units(40_000)) > 3
    assert read_all(alone, 40_000) == (whole, [])


def test_large_stream_without_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.sources import map_cc

    parts_of(tmp_path, MEMBERS["one member"], 36)
    monkeypatch.setattr(map_cc, "_LARGE", 1000)
    settings = {"kind": "map_cc", "path": str(tmp_path)}
    with pytest.raises(DataError, match="ouro data index"):
        source_of(settings).units(1)
    assert len(source_of({**settings, "unindexed": True}).units(1)) == 1


_BUILD = """
import sys
from pathlib import Path
from data_prep.formats import gzip_index
from data_prep.formats.files import local_file
from data_prep.formats.gzip_parts import GzipParts
gzip_index._SAVE_SECONDS = 0.05
gzip_index._READ = 1 << 16
path = Path(sys.argv[1])
GzipParts(str(path), (local_file(path),), {}).make_index(lambda at: print(at, flush=True), 1 << 16)
"""


def test_a_killed_pass_goes_on(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl.gz", gzip.compress(content_of(8000)))
    process = subprocess.Popen([sys.executable, "-c", _BUILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > path.stat().st_size // 3:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert not index_file(str(path), None).exists()
    told: list[int] = []
    parts = GzipParts(str(path), (local_file(path),), {})
    index = parts.make_index(told.append, 1 << 16)
    assert told[0] > path.stat().st_size // 4 and index.content == len(zlib.decompress(path.read_bytes(), 31))
    names = ["a.jsonl.gz", "a.jsonl.gz.gzidx", "a.jsonl.gz.gzidx.note"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    found, faults = lines_of(parts, parts.units(100_000))
    assert found == content_of(8000).rstrip(b"\n").split(b"\n") and not faults


def test_a_stream_too_small_for_places(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, gzip.compress(b'{"text": "x"}\n{}\n'))
    assert parts.make_index(list[int]().append).content == 17
    assert lines_of(parts, [Unit(parts.path, 1, 5, 17)]) == ([b"{}"], [])


def test_time_is_not_part_of_the_index(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, MEMBERS["one member"])
    parts.make_index(list[int]().append, SPACING)
    for part in parts.parts:
        os.utime(part.path, (time.time() + 9, time.time() + 9))
    assert len(parts_of(tmp_path, MEMBERS["one member"]).units(40_000)) > 3
