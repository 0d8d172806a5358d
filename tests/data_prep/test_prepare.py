"""Data preparation on small corpora: what comes out, what is done again, what a kill leaves behind."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
import zstandard

from data_prep.look import documents, stats
from data_prep.merge import entropy_of
from data_prep.prepare import load_data_recipe, prepare
from data_prep.progress import State
from data_prep.shards import group_units, refuse
from data_prep.sources.base import Document, Unit
from data_prep.sources.python_library import PythonProse, PythonStdlib
from data_prep.verify import verify
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError
from tests.data_prep.test_byte_level import needs_extension


class Lines:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done = 0

    def update(self, state: State) -> None:
        self.done = state.done_bytes

    def end(self) -> None:
        pass

    def say(self, line: str) -> None:
        self.lines.append(line)


def text(number: int) -> str:
    return f"Document {number} says: " + " ".join(f"word{(number * 7 + i) % 50}" for i in range(60)) + ".\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "raw and prepared"
    (root / "raw").mkdir(parents=True)
    for shard in range(4):
        lines = "".join(json.dumps({"text": text(shard * 25 + i), "url": f"u{i}"}) + "\n" for i in range(25))
        if shard == 0:
            (root / "raw" / "0.jsonl").write_text(lines)
        elif shard == 1:
            (root / "raw" / "1.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        else:
            (root / "raw" / f"{shard}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "books").mkdir()
    for number in range(30):
        (root / "books" / f"{number:02d}.txt").write_text(text(1000 + number))
    return root


def recipe_file(root: Path, **changes: object) -> Path:
    values = {
        "output": str(root / "out"),
        "tokenizer": {"kind": "train", "vocab": 400},
        "validation_fraction": 0.2,
        "shard_bytes": 2000,
        "sources": [
            {"name": "web", "kind": "jsonl", "path": str(root / "raw")},
            {"name": "books", "kind": "text_folder", "path": str(root / "books")},
        ],
        **changes,
    }
    file = root / "data.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run(root: Path, *, workers: int = 1, force: bool = False, **changes: object) -> tuple[list[Path], list[str]]:
    lines = Lines()
    prefixes = prepare(load_data_recipe(recipe_file(root, **changes)), lines, workers=workers, force=force)
    return prefixes, lines.lines


def test_every_document_once_and_readable_by_megatron(root: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefixes, _ = run(root)
    assert [prefix.name for prefix in prefixes] == ["web", "web-validation", "books", "books-validation"]
    tokenizer = load_tokenizer(root / "out" / "tokenizer")
    seen = []
    for prefix in prefixes[:2]:
        dataset = IndexedDataset(str(prefix))
        assert dataset.index.dtype == np.uint16
        for index in range(len(dataset)):
            ids = dataset[index].tolist()
            assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
            seen.append(tokenizer.decode(ids[:-1]))
    assert sorted(seen) == sorted(text(number) for number in range(100))


def test_order_does_not_depend_on_workers(root: Path) -> None:
    run(root)
    alone = (root / "out" / "web.bin").read_bytes()
    run(root, workers=2, force=True)
    assert (root / "out" / "web.bin").read_bytes() == alone


@needs_extension
def test_slow_tokenising_is_said_once_and_gives_the_same(root: Path) -> None:
    _, lines = run(root)
    assert not any("does the work" in line for line in lines)
    fast = {file.name: file.read_bytes() for file in (root / "out").glob("*.bin")}
    folder = root / "out" / "tokenizer"
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    shutil.copytree(folder, root / "slow")
    (root / "slow" / "tokenizer.json").write_text(json.dumps(content))
    _, lines = run(root, output=str(root / "again"), tokenizer={"kind": "existing", "path": str(root / "slow")})
    assert [line for line in lines if "does the work" in line] == [
        f"{root / 'slow'}: `tokenizers` does the work, not the much faster path: normalizer NFC"
    ]
    assert {file.name: file.read_bytes() for file in (root / "again").glob("*.bin")} == fast


def test_second_run_does_nothing(root: Path) -> None:
    run(root)
    before = {file: file.stat().st_mtime_ns for file in (root / "out").rglob("*") if file.is_file()}
    _, lines = run(root)
    assert sum("up to date" in line for line in lines) == 3
    assert {file: file.stat().st_mtime_ns for file in (root / "out").rglob("*") if file.is_file()} == before
    assert not list((root / "out").glob(".*"))


def test_changed_input_is_done_again(root: Path) -> None:
    run(root)
    (root / "books" / "30.txt").write_text(text(77))
    _, lines = run(root)
    assert not any("books: up to date" in line for line in lines)
    assert sum(stats(root / "out" / name).documents for name in ("books", "books-validation")) == 31


def test_held_out_by_key(root: Path) -> None:
    run(root, sources=[{"name": "web", "kind": "jsonl", "path": str(root / "raw"), "key": "url"}])
    held_out = sum(Document(f"u{i}", "").is_below(0.2) for i in range(25))
    assert stats(root / "out" / "web-validation").documents == 4 * held_out > 0


def test_kill_and_go_on(root: Path) -> None:
    script = (
        "import sys, time\n"
        "import data_prep.prepare as p\n"
        "from pathlib import Path\n"
        "from tests.data_prep.test_prepare import Lines\n"
        "real = p.tokenise_shard\n"
        "def slow(task, pulse):\n    time.sleep(0.5); return real(task, pulse)\n"
        "p.tokenise_shard = slow\n"
        "p.prepare(p.load_data_recipe(Path(sys.argv[1])), Lines(), workers=1)\n"
    )
    file = recipe_file(root, keep_parts=True)
    process = subprocess.Popen([sys.executable, "-c", script, str(file)], cwd=Path(__file__).resolve().parents[2])
    deadline = time.monotonic() + 60
    whole = ".parts/web/" + "[0-9a-f]" * 32  # not those in the making, which have .part- in their names
    while len(list((root / "out").glob(f"{whole}/done.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "out" / "web.manifest.json").exists()
    finished = {
        path: path.stat().st_mtime_ns
        for path in (root / "out").glob(f"{whole}/*")
        if (path.parent / "done.json").exists()
    }
    prepare(load_data_recipe(file), Lines(), workers=1)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list((root / "out").rglob("*part-*"))
    interrupted = (root / "out" / "web.bin").read_bytes()
    run(root, force=True)
    assert (root / "out" / "web.bin").read_bytes() == interrupted


def test_verify_finds_one_changed_byte(root: Path) -> None:
    run(root)
    assert "equals its manifest" in verify(root / "out" / "web")
    path = root / "out" / "web.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"web\.bin.*manifest"):
        verify(root / "out" / "web")


def test_stats_and_documents(root: Path) -> None:
    run(root)
    prefix = root / "out" / "books"
    found = stats(prefix)
    ids = np.fromfile(root / "out" / "books.bin", dtype=np.uint16)
    p = np.bincount(ids) / len(ids)
    p = p[p > 0]
    assert found.unigram_entropy == pytest.approx(float(-(p * np.log(p)).sum()))
    assert found.tokens == len(ids)
    shown = next(documents(prefix, 1, 1, None))
    assert shown.number == 1 and len(shown.ids) > 10 and shown.text.startswith("Document 10")
    assert "".join(run.text for run in shown.runs) == shown.text
    assert [run.text for run in shown.runs if run.special] == ["<|endoftext|>"]
    with pytest.raises(DataError, match="document 999"):
        next(documents(prefix, 999, 1, None))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [{"name": "x", "kind": "jsonl", "path": "/nowhere"}]}, "/nowhere"),
        ({"sources": [{"name": "x", "kind": "jsnol", "path": "/"}]}, "sources.0: no kind is called 'jsnol'; .*'jsonl'"),
        ({"sources": [{"name": "x", "kind": "@", "path": "/"}]}, "no kind is called '@'; there are text_folder, jsonl"),
        ({"sources": [{"name": "x", "path": "/"}]}, r"sources\.0\.kind is missing"),
        ({"sources": [{"name": "x", "kind": "jsonl"}]}, r"sources\.0\.path is missing"),
        ({"sources": [{"name": "x/y", "kind": "jsonl", "path": "p"}]}, r"sources\.0\.name: .* \(got 'x/y'\)"),
        (
            {"sources": [{"name": "x", "kind": "jsonl", "path": "p", "txt": 1}]},
            r"unknown key sources\.0\.txt; did you mean 'text'",
        ),
        (
            {"sources": [{"name": "x", "kind": "jsonl", "path": "p", "filters": {"min_chars": 1}}]},
            r"sources\.0\.filters\.min_chars; did you mean 'min_characters'",
        ),
        ({"filters": {"decontaminate": {"file": []}}}, "filters.decontaminate.file; did you mean 'files'"),
        ({"sorces": []}, "unknown key sorces; did you mean 'sources'"),
        ({"tokenizer": {"kind": "train", "vocab": 10}}, r"data\.yaml: tokenizer\.vocab: .*\(got 10\)"),
        ({"tokenizer": {"kind": "existing", "path": "/nowhere"}}, "tokenizer.json"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
    ],
)
def test_bad_recipes(root: Path, changes: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(root, **changes)


@pytest.mark.parametrize("content", ["", "a list", "- 1"])
def test_no_recipe(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(DataError, match="holds no settings"):
        load_data_recipe(tmp_path / "data.yaml")


@pytest.mark.parametrize(
    ("line", "words"),
    [("{broken", r"bad\.jsonl, line 2, byte 17"), ('{"body": "x"}', "no field 'text'"), ('{"text": 5}', "int")],
)
def test_bad_lines(root: Path, line: str, words: str) -> None:
    (root / "raw" / "bad.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=words):
        run(root)


def test_cut_off_archive(root: Path) -> None:
    path = root / "raw" / "1.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"1\.jsonl\.gz"):
        run(root)


def test_prose_held_out_is_not_in_the_code() -> None:
    code, prose = PythonStdlib(name="c", kind="python_stdlib"), PythonProse(name="p", kind="python_prose")
    unit = next(unit for unit in code.units(1000) if Path(unit.path).name == "argparse.py")
    (document,) = code.read(unit, refuse)
    (docstrings,) = prose.read(unit, refuse)
    assert document.key == docstrings.key == "argparse.py"
    assert docstrings.text[:80] in document.text
    assert not any("pydoc_data" in unit.path for unit in code.units(1000))


def test_digits_stay_single_and_entropy_is_the_formula(root: Path) -> None:
    run(root)
    tokenizer = load_tokenizer(root / "out" / "tokenizer")
    assert len(tokenizer.encode("20261124")) == 8
    assert entropy_of(np.array([1, 1, 1, 1])) == pytest.approx(np.log(4))


def test_shards_keep_the_order_of_units() -> None:
    units = [Unit(str(index), size) for index, size in enumerate([5, 5, 20, 1, 1])]
    groups = group_units(units, 10)
    assert [len(group) for group in groups] == [2, 1, 2]
    assert [unit for group in groups for unit in group] == units
