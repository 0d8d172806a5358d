"""Documents that must be held in one piece and take more memory than is allowed: faults, until more is allowed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import document_encoder, encode, filters, safe_cuts, shards
from data_prep.formats import lines as line_files
from data_prep.formats import long_json, parquet, parquet_pages, tables
from data_prep.look import stats
from data_prep.sources import text_folder
from ouro_megatron.data.indexed import read_manifest
from ouro_megatron.errors import DataError
from tests.data_prep.test_byte_level import needs_extension, stdlib, trained
from tests.data_prep.test_chat import write_chat_tokenizer
from tests.data_prep.test_pipeline import content, run
from tests.tiny import write_tokenizer

LEAST = 150_000_000
"""Least `max_document_memory`. Here a byte takes 150 times what it does, and a conversation of 62,500 takes it all."""


@pytest.fixture(autouse=True)
def heavy_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (document_encoder, "CONVERSATION"),
        (encode, "UNCUT"),
        (safe_cuts, "UNCUT"),
        (filters, "_WORD_MEMORY"),
        (line_files, "HELD"),
        (long_json, "HELD"),
        (parquet, "PAGE"),
    ):
        monkeypatch.setattr(module, name, 150 * getattr(module, name))


def turns(length: int) -> dict[str, Any]:
    question = ("why " * (length // 4))[:length]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "so"}]}


def faults(root: Path, output: str, source: str) -> list[dict[str, Any]]:
    file = root / output / f"{source}.faults.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def conversations(root: Path, form: str, longest: int = 9 << 20) -> dict[str, Any]:
    """Five conversations of which the second and the fourth are too long."""
    rows = [turns(length) for length in (30, 70_000, 40, longest, 50)]
    (root / "talks").mkdir()
    if form == "lines":
        (root / "talks" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), root / "talks" / "a.parquet", row_group_size=1)
    write_chat_tokenizer(root / "tokenizer")
    source = {"name": "talks", "kind": "chat", "path": str(root / "talks")}
    return {"sources": [source], "validation_fraction": 0}


def limited(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with the least limit for each source."""
    return {**settings, "sources": [{**source, "max_document_memory": LEAST} for source in settings["sources"]]}


@pytest.mark.parametrize("form", ["lines", "parquet"])
def test_conversations(tmp_path: Path, form: str) -> None:
    settings = conversations(tmp_path, form, 9 << 20 if form == "lines" else 80_000)
    with pytest.raises(DataError, match=r"(?s)2 of \d records.*a conversation of 0\.1 MB .* allows 150 MB"):
        run(tmp_path, "out", shard_bytes=10**6, **limited(settings))
    run(tmp_path, "out", shard_bytes=10**6, max_fault_rate=0.4, **limited(settings))
    assert stats(tmp_path / "out" / "talks").documents == 3
    found = faults(tmp_path, "out", "talks")
    assert len(found) == 2 and all("max_document_memory" in fault["reason"] for fault in found)
    assert form == "parquet" or "a line of 9.4 MB must be held in one piece and takes about 11," in found[1]["reason"]


def test_more_memory_makes_a_source_anew_and_no_other(tmp_path: Path) -> None:
    settings = conversations(tmp_path, "lines", 80_000)
    run(tmp_path, "whole", **settings)
    assert stats(tmp_path / "whole" / "talks").documents == 5
    other = {"name": "other", "kind": "jsonl", "path": str(tmp_path / "other.jsonl")}
    (tmp_path / "other.jsonl").write_text('{"text": "a b"}\n')
    few = limited(settings)
    run(tmp_path, "out", max_fault_rate=1.0, **{**few, "sources": [other, *few["sources"]]})
    assert stats(tmp_path / "out" / "talks").documents == 3
    said = run(tmp_path, "out", **{**settings, "sources": [other, *settings["sources"]]})
    assert "other: up to date" in said and "talks: up to date" not in said
    assert content(tmp_path, "out")["talks.bin"] == content(tmp_path, "whole")["talks.bin"]


def test_what_a_filter_leaves_out_is_no_fault(tmp_path: Path) -> None:
    settings = conversations(tmp_path, "lines", 80_000)
    run(tmp_path, "out", filters={"max_characters": 1000}, **limited(settings))
    manifest = read_manifest(tmp_path / "out" / "talks")
    assert manifest is not None and manifest["source_counts"]["left_out"] == {"long": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (line_files, tables, text_folder):
        monkeypatch.setattr(module, "LONG", 3000)
    monkeypatch.setattr(long_json, "_LONG_STRING", 1000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["alone", "between others"])
def test_a_tokenizer_that_takes_whole_texts(tmp_path: Path, where: str) -> None:
    """One of an unknown chain needs 130 bytes a character. Nothing of a text that is refused stays."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Prepend", "prepend": "_"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = ["a long text, " * 700, "three"]
    if where == "between others":
        texts = ["one", texts[0], "two", "a text " * 500, "three"]
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, text in enumerate(texts):
        (raw / f"{number}.txt").write_text(text)
    source = {"name": "texts", "kind": "text_folder", "path": str(raw)}
    settings: dict[str, Any] = {"sources": [source], "validation_fraction": 0, "max_fault_rate": 1.0}
    run(tmp_path, "out", **limited(settings))
    (fault,) = faults(tmp_path, "out", "texts")
    assert "a text that this tokenizer takes as a whole of 0.0 MB" in fault["reason"]
    (raw / f"{texts.index('a long text, ' * 700)}.txt").unlink()
    run(tmp_path, "short", **settings)
    assert content(tmp_path, "short")["texts.bin"] == content(tmp_path, "out")["texts.bin"]


@needs_extension
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("path", ["slow", "decontaminate"])
def test_a_text_of_one_word(tmp_path: Path, path: str) -> None:
    folder = trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    (tmp_path / "genes").mkdir()
    (tmp_path / "genes" / "a.txt").write_text("-" * (40_000 if path == "slow" else 100_000))
    (tmp_path / "genes" / "b.txt").write_text("a b")
    settings: dict[str, Any] = {"validation_fraction": 0, "max_fault_rate": 1.0}
    if path == "slow":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "NFC"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        (tmp_path / "test.txt").write_text("one two three\n")
        settings["filters"] = {"decontaminate": {"files": [str(tmp_path / "test.txt")], "ngram": 3}}
    settings["sources"] = [{"name": "genes", "kind": "text_folder", "path": str(tmp_path / "genes")}]
    run(tmp_path, "out", **limited(settings))
    (fault,) = faults(tmp_path, "out", "genes")
    assert "a text without" in fault["reason"] and stats(tmp_path / "out" / "genes").documents == 1
    run(tmp_path, "out", **settings)
    assert stats(tmp_path / "out" / "genes").documents == 2


def test_what_a_row_holds_beside_its_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    rows = [{"text": "a b", "html": "x" * 5_000_000}, {"text": "c d", "html": "y"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "texts", "kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
    settings: dict[str, Any] = {"sources": [source], "validation_fraction": 0, "max_fault_rate": 1.0}
    run(tmp_path, "out", shard_bytes=10**7, **limited(settings))
    (fault,) = faults(tmp_path, "out", "texts")
    assert "what the line holds beside its text of 5.0 MB" in fault["reason"] and fault["where"] == "line 1, byte 0"


def test_a_page_that_pyarrow_must_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold any number of documents, so it ends the run; and a small limit of documents is not one of pages."""
    monkeypatch.setattr(parquet_pages, "LONG_PAGE", 1000)
    write_tokenizer(tmp_path / "tokenizer")
    texts = ["a b", *["word " * 60_000] * 10, "c d"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="brotli", use_dictionary=False)
    source = {"name": "texts", "kind": "parquet", "path": str(tmp_path / "a.parquet")}
    settings: dict[str, Any] = {"sources": [source], "validation_fraction": 0, "max_fault_rate": 1.0}
    with pytest.raises(
        DataError, match=r"a\.parquet, row group 0: a page of column 'text' of 3\.0 MB .* allows 1,000 MB"
    ):
        run(tmp_path, "out", **limited(settings))
    settings["sources"] = [{**source, "max_document_memory": 2_000_000_000}]
    run(tmp_path, "out", **settings)
    assert stats(tmp_path / "out" / "texts").documents == 12


@needs_extension
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_long_texts_of_other_types_go_to_files_too(
    tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they are read: the same ids as of plain strings."""
    monkeypatch.setattr(shards, "LONG", 3000)
    trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    texts = ["a b", "\u00e9 word " * 2000, "c d", "x" * 3001]
    for name, column in (("plain", pa.array(texts)), ("other", pa.array(texts, kind))):
        batch = pa.record_batch({"text": column})
        (tmp_path / name).mkdir()
        with pa.OSFile(str(tmp_path / name / "a.arrow"), "wb") as out, pa.ipc.new_stream(out, batch.schema) as stream:
            stream.write_batch(batch)
        source = {"name": "texts", "kind": "arrow", "path": str(tmp_path / name)}
        run(tmp_path, f"out-{name}", sources=[source], validation_fraction=0)
    assert content(tmp_path, "out-plain") == content(tmp_path, "out-other")
    assert stats(tmp_path / "out-other" / "texts").documents == 4
