"""Sources behind fsspec URLs, reads that fail for a while, and the `datasets` library."""

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from data_prep.fixtures import make_fixture
from data_prep.formats import remote, tables
from data_prep.formats.files import open_file
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all, read_apart, source_of


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "kind", ["jsonl", "parquet", "arrow", "nemotron_cc", "map_cc", "prolong", "chat", "text_folder"]
)
def test_a_corpus_behind_a_url(kind: str, tmp_path: Path, memory: MemoryFileSystem) -> None:
    made = make_fixture(kind, tmp_path)
    root = str(made.settings["path"])
    memory.put(root, "/bucket/corpus", recursive=True)
    settings = {**made.settings, "path": "memory://bucket/corpus"}
    settings.pop("manifest", None)
    for target in (1 << 26, 300):
        documents, faults = read_all(settings, target)
        local, _ = read_all(made.settings, target)
        assert not faults
        assert [(d.text, d.messages) for d in documents] == [(d.text, d.messages) for d in local]
    assert all(unit.stamp and unit.path.startswith("memory://") for unit in source_of(settings).units(300))


def test_file_urls_need_no_fsspec(tmp_path: Path) -> None:
    made = make_fixture("jsonl", tmp_path)
    assert read_all({**made.settings, "path": f"file://{made.settings['path']}"}) == read_all(made.settings)


def test_nothing_there(memory: MemoryFileSystem) -> None:
    with pytest.raises(DataError, match="memory://nowhere"):
        source_of({"kind": "jsonl", "path": "memory://nowhere"}).units(1)
    with pytest.raises(DataError, match="nosuchscheme"):
        source_of({"kind": "jsonl", "path": "nosuchscheme://x"}).units(1)


class FlakyFile(MemoryFile):
    """Every second read fails, as networks do."""

    reads = 0

    def read(self, size: int = -1) -> bytes:
        FlakyFile.reads += 1
        if FlakyFile.reads % 2:
            raise ConnectionError("reset by peer")
        return super().read(size)


class FlakySystem(MemoryFileSystem):
    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    broken = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if FlakySystem.broken:
            raise ConnectionError("no route to host")
        found = super()._open(path, mode, **more)
        return FlakyFile(self, path, found.getvalue()) if mode == "rb" else found


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> FlakySystem:
    fsspec.register_implementation("flaky", FlakySystem, clobber=True)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "_PATIENCE", 0.03)
    monkeypatch.setattr(FlakySystem, "broken", False)
    return FlakySystem()


def test_reading_goes_on_where_it_failed(flaky: FlakySystem) -> None:
    rows = [{"text": f"document {number} " + "x" * 50_000} for number in range(60)]
    flaky.pipe("/corpus/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    documents, faults = read_all({"kind": "jsonl", "path": "flaky://corpus"}, 1_000_000)
    assert [document.text for document in documents] == [row["text"] for row in rows]
    assert not faults and FlakyFile.reads > 2


def test_a_file_that_is_another_one_after_a_failure(flaky: FlakySystem) -> None:
    flaky.pipe("/corpus/a.bin", b"a" * (3 << 20))
    FlakyFile.reads = 0
    with open_file("flaky://corpus/a.bin", {}) as stream:
        assert stream.read(10) == b"a" * 10
        flaky.pipe("/corpus/a.bin", b"b" * (3 << 20))
        with pytest.raises(DataError, match=r"a\.bin: was written again while it was being read"):
            stream.read()


def test_a_lasting_failure_is_no_fault_of_the_file(flaky: FlakySystem) -> None:
    flaky.pipe("/corpus/a.jsonl", b'{"text": "x"}\n')
    source = source_of({"kind": "jsonl", "path": "flaky://corpus"})
    (unit,) = source.units(1 << 20)
    FlakySystem.broken = True
    with pytest.raises(DataError, match="tried 5 times: ConnectionError: no route to host"):
        list(source.read(unit, list[Any]().append))
    with pytest.raises(DataError, match=r"is not there any more"):
        open_file("flaky://corpus/gone", {})


def test_saved_datasets_are_split_by_rows(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}", "url": f"u{number}"} for number in range(50)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"), num_shards=2)
    settings = {"kind": "datasets", "path": str(tmp_path / "one"), "key": "url"}
    source = source_of(settings)
    assert len(source.units(500)) > 2
    documents, faults = read_all(settings, 500)
    assert [(d.text, d.key) for d in documents] == [(row["text"], row["url"]) for row in rows] and not faults
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
    )
    both.save_to_disk(str(tmp_path / "two"))
    assert len(read_all({**settings, "path": str(tmp_path / "two"), "split": "test"})[0]) == 3


@pytest.mark.parametrize("saved", [True, False])
def test_long_texts_of_datasets_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool) -> None:
    monkeypatch.setattr(tables, "LONG", 100)
    rows = [{"text": f"document {number} " * (1 + 20 * (number % 2)), "n": number} for number in range(250)]
    whole = datasets.Dataset.from_list(rows)
    if saved:
        whole.save_to_disk(str(tmp_path / "one"))
    else:
        (tmp_path / "one").mkdir()
        whole.to_parquet(tmp_path / "one" / "a.parquet")
    settings = {"kind": "datasets", "path": str(tmp_path / "one"), "where": {"n": list(range(240))}}
    found, faults = read_apart(settings, tmp_path)
    assert found == [(row["text"], row["n"] % 2 == 1) for row in rows[:240]] and not faults  # type: ignore[operator]


def test_a_text_that_is_no_utf8_in_a_dataset(tmp_path: Path) -> None:
    values = pa.array([b"good", b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    documents, faults = read_all({"kind": "datasets", "path": str(tmp_path)})
    assert [document.text for document in documents] == ["good", "fine"]
    assert [fault.where for fault in faults] == ["row 1"] and "0xff" in faults[0].reason


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "json", "csv"])
def test_datasets_of_data_files(tmp_path: Path, kind: str) -> None:
    """Files that our readers know are theirs, in ranges; the library streams the others. The rows are the same."""
    rows = [{"text": f"document {number}, é", "url": f"u{number}"} for number in range(60)]
    whole = datasets.Dataset.from_list(rows)
    (tmp_path / "data").mkdir()
    for name in ("train-0", "test-0"):
        file = tmp_path / "data" / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(whole.data.table, file, row_group_size=20)
        elif kind == "arrow":
            with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, whole.data.schema) as stream:
                stream.write_table(whole.data.table)
        elif kind == "csv":
            whole.to_csv(file)
        elif kind == "json":
            file.write_text(json.dumps(rows))
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            packed: dict[str, Callable[[bytes], bytes]] = {
                "jsonl.gz": gzip.compress,
                "jsonl.bz2": bz2.compress,
                "jsonl.zst": zstandard.compress,
            }
            file.write_bytes(packed[kind](content) if kind in packed else content)
    settings = {"kind": "datasets", "path": str(tmp_path)}
    found, faults = read_all(settings, 1000)
    assert [(d.text, d.key) for d in found] == [(row["text"], row["url"]) for row in rows] and not faults
    units = source_of(settings).units(500)
    assert all((unit.path == str(tmp_path)) == (kind in ("json", "csv")) for unit in units)
    assert len(units) > 1 or kind not in ("parquet", "jsonl")


def test_what_a_card_says_of_its_files_is_followed(tmp_path: Path) -> None:
    """By the library, which reads them then: filters, numbers that become text, lines that are none."""
    pq.write_table(pa.table({"text": ["one", "two"], "keep": [1, 0], "n": [1, 2]}), tmp_path / "a.parquet")
    settings = {"kind": "datasets", "path": str(tmp_path)}
    assert all(unit.path != str(tmp_path) for unit in source_of(settings).units(1))
    (document, _), _ = read_all(settings)
    assert document.fields["keep"] == 1  # a filter may ask for it
    card = "configs:\n- config_name: default\n  data_files: a.parquet\n"
    (tmp_path / "README.md").write_text(f"---\n{card}  filters: [[keep, ==, 1]]\n---\n")
    assert [document.text for document in read_all(settings)[0]] == ["one"]
    features = "dataset_info:\n  features:\n  - {name: n, dtype: string}\n  - {name: text, dtype: string}\n"
    (tmp_path / "README.md").write_text(f"---\n{card}{features}  - {{name: keep, dtype: int64}}\n---\n")
    assert [document.text for document in read_all({**settings, "text": "n"})[0]] == ["1", "2"]


def test_lines_that_are_an_array_are_the_librarys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    documents, faults = read_all({"kind": "datasets", "path": str(tmp_path)})
    assert [document.text for document in documents] == ["one", "two"] and not faults


def test_a_broken_file_of_a_dataset_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n'))
    documents, faults = read_all({"kind": "datasets", "path": str(tmp_path)})
    assert [document.text for document in documents] == ["good"]
    assert [fault.path for fault in faults] == [str(tmp_path / "a.jsonl.gz")]


def test_datasets_streams_and_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    settings = {"kind": "datasets", "path": str(tmp_path)}
    with pytest.raises(DataError, match="Set `chat: true`"):
        source_of(settings).units(1)
    (document,), _ = read_all({**settings, "chat": True})
    assert document.messages == turns


def test_datasets_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open .*nowhere.*a folder must hold data files"):
        source_of({"kind": "datasets", "path": str(tmp_path / "nowhere")}).units(1)
