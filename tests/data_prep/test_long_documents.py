"""Whole runs on long documents: the same files whatever is held, and memory that does not grow with them."""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from benchmarks.long_documents import peak
from data_prep.formats import lines as line_files
from data_prep.formats import long_json, tables
from data_prep.prepare import load_data_recipe, prepare
from data_prep.sources import text_folder
from tests.data_prep.test_byte_level import needs_extension, stdlib, trained
from tests.data_prep.test_long_text import TEXT
from tests.data_prep.test_prepare import Lines


def corpus(folder: Path) -> list[dict[str, Any]]:
    """The same documents, short and long, good and broken, in every kind of file; returns the sources."""
    choose = random.Random(5)
    texts = [TEXT * choose.choice([1, 1, 1, 30]) + str(number) for number in range(30)]
    texts += [texts[3], texts[29], "Z" * 5000, "", "one two three four five " + TEXT * 20]
    table = [{"text": text, "url": f"u{number % 9}", "language": "en"} for number, text in enumerate(texts)]
    lines_ = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() for number, row in enumerate(table)]
    lines_[5:5] = [
        b'{"text": "' + b"x" * 9000 + b"\xff" + b'"}',
        b'{"text": "' + b"y" * 9000,
        b'{"text": "\\ud800' + b"z" * 9000 + b'"}',
    ]
    content = b"\n".join(lines_) + b"\n"
    for name in ("plain", "gz", "zst", "parquet", "arrow", "txt"):
        (folder / name).mkdir(parents=True)
    (folder / "plain" / "a.jsonl").write_bytes(content)
    (folder / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(content) + zstandard.compress(content)[:-9])
    pq.write_table(pa.Table.from_pylist(table), folder / "parquet" / "a.parquet", row_group_size=10)
    with (
        pa.OSFile(str(folder / "arrow" / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.Table.from_pylist(table).schema) as out,
    ):
        out.write_table(pa.Table.from_pylist(table), max_chunksize=9)
    for number, text in enumerate(texts):
        (folder / "txt" / f"{number:02d}.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + text.encode())
    (folder / "txt" / "broken.txt").write_bytes(b"q" * 9000 + b"\xe4")
    (folder / "txt" / "good.txt.gz").write_bytes(gzip.compress(b"good " * 3000))
    (folder / "txt" / "cut.txt.gz").write_bytes(gzip.compress(random.Random(1).randbytes(9000).hex().encode())[:-20])
    kinds = {
        "plain": "jsonl",
        "gz": "jsonl",
        "zst": "jsonl",
        "parquet": "parquet",
        "arrow": "arrow",
        "txt": "text_folder",
    }
    return [
        {
            "name": name,
            "kind": kind,
            "path": str(folder / name),
            **({"key": "url"} if name == "gz" else {}),
            **({"take": 0.8} if name == "zst" else {}),
        }
        for name, kind in kinds.items()
    ]


@needs_extension
@pytest.mark.parametrize("dedup", [False, True])
def test_the_same_bytes_whatever_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool) -> None:
    sources = corpus(tmp_path / "raw")[: 1 if dedup else None]
    (tmp_path / "test.txt").write_text("one two three four five\n")
    tokenizer = trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    found = []
    for name, long in (("held", 1 << 40), ("spilled", 3000)):
        for module in (line_files, tables, text_folder):
            monkeypatch.setattr(module, "LONG", long)
        monkeypatch.setattr(long_json, "_LONG_STRING", long // 4)
        filters = {"min_characters": 100, "decontaminate": {"files": [str(tmp_path / "test.txt")], "ngram": 5}}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            yaml.safe_dump(
                {
                    "output": str(tmp_path / name),
                    "tokenizer": {"kind": "existing", "path": str(tokenizer)},
                    "validation_fraction": 0.3,
                    "shard_bytes": 30_000,
                    "max_fault_rate": 1.0,
                    "filters": {**filters, "exact_dedup": dedup},
                    "sources": sources,
                }
            )
        )
        prepare(load_data_recipe(recipe), Lines(), workers=1)
        out = tmp_path / name
        assert not list(out.glob(".parts"))
        files = {file.name: file.read_bytes() for suffix in ("bin", "idx") for file in out.glob(f"*.{suffix}")}
        assert len(files) == 4 * len(sources)
        counts = {}
        for file in sorted(out.glob("*.manifest.json")):
            manifest = json.loads(file.read_text())
            counts[file.name] = (manifest["source_counts"], manifest["units"])
        faults = {file.name: [json.loads(line)["where"] for line in file.open()] for file in out.glob("*.faults.jsonl")}
        assert len(faults["plain.faults.jsonl"]) == 3 and (dedup or len(faults["txt.faults.jsonl"]) == 2)
        left_out = counts["plain.manifest.json"][0]["left_out"]
        assert left_out["contaminated"] == 1 and left_out.get("duplicate", 0) == 2 * dedup
        found.append((files, counts, faults))
    assert found[0] == found[1]


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.parametrize(
    ("form", "millions", "bound"),
    [
        ("lines", (4, 40), 0.7),  # not even the text is held once
        ("text files", (4, 40), 0.7),
        ("one word", (4, 40), 0.7),
        ("parquet", (4, 40), 0.7),  # 3.8 where pyarrow unpacks the page
        ("parquet, plain", (4, 40), 0.7),
        ("parquet, URL", (4, 40), 0.7),
        ("dataset's parquet", (4, 40), 0.7),
        ("saved dataset", (4, 40), 2.0),  # the pages of the mapped file, which the kernel can take back
        ("ProLong, joined", (2, 6), 3.5),
        ("slow path", (2, 8), 4.0),  # 130 in one piece
        ("chat", (1, 4), 17.0),  # the turns, what the template makes of them twice, the ids; 175 in one piece
    ],
)
def test_memory_for_a_character(tmp_path: Path, form: str, millions: tuple[int, int], bound: float) -> None:
    """A real process and two documents of some million characters, or of many more."""
    tokenizer = trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    text = "".join(stdlib(0, 60)).encode("ascii", "ignore").decode()[:1_000_000]
    if form == "one word":
        text = "".join(random.Random(0).choices("acgt", k=1_000_000))
    peaks = [peak(form, [text * number] * 2, tokenizer, tmp_path / str(number)) for number in millions]
    assert (peaks[1] - peaks[0]) / (millions[1] - millions[0]) < bound, peaks
