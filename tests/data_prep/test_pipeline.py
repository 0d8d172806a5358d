"""The pipeline as a whole: the same bytes however the work is shared, faults, duplicates, several pairs, kills."""

import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard

from data_prep.look import stats
from data_prep.plan import find_prefixes
from data_prep.prepare import load_data_recipe, merge_all, prepare
from data_prep.status import status
from data_prep.verify import verify
from ouro_megatron.data.indexed import read_index, read_manifest, with_suffix
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError
from tests.data_prep.test_chat import write_chat_tokenizer
from tests.data_prep.test_prepare import Lines
from tests.tiny import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OURO = Path(sys.executable).with_name("ouro")


def text(number: int) -> str:
    generator = random.Random(number)
    return f"Document {number}: " + " ".join(
        f"word{generator.randrange(50)}" for _ in range(generator.randrange(5, 60))
    )


def lines(numbers: range, **fields: Any) -> str:
    return "".join(json.dumps({"text": text(number), "url": f"u{number}", **fields}) + "\n" for number in numbers)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sources of 180 documents in four kinds of files; 40 of the second are copies of the first's."""
    web, more = tmp_path / "web", tmp_path / "more"
    web.mkdir()
    more.mkdir()
    (web / "0.jsonl").write_text(lines(range(0, 60)))
    (web / "1.jsonl.gz").write_bytes(gzip.compress(lines(range(60, 90)).encode()))
    (web / "2.jsonl.zst").write_bytes(zstandard.compress(lines(range(90, 120)).encode()))
    (more / "0.jsonl").write_text(lines(range(100, 160)))
    (more / "1.jsonl").write_text(lines(range(0, 20)) + lines(range(160, 180)))
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def recipe_file(root: Path, output: str, **changes: Any) -> Path:
    values = {
        "output": str(root / output),
        "tokenizer": {"kind": "existing", "path": str(root / "tokenizer")},
        "validation_fraction": 0.2,
        "shard_bytes": 4000,
        "sources": [
            {"name": "web", "kind": "jsonl", "path": str(root / "web"), "key": "url"},
            {"name": "more", "kind": "jsonl", "path": str(root / "more"), "key": "url"},
        ],
        **changes,
    }
    file = root / f"{output}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run(root: Path, output: str, *, workers: int = 1, **changes: Any) -> list[str]:
    watcher = Lines()
    prepare(load_data_recipe(recipe_file(root, output, **changes)), watcher, workers=workers)
    return watcher.lines


def content(root: Path, output: str) -> dict[str, bytes]:
    """All files of a result but what tells of its making."""
    return {
        file.name: file.read_bytes()
        for file in sorted((root / output).iterdir())
        if file.suffix in (".bin", ".idx") or file.name.endswith(".faults.jsonl")
    }


def texts(prefix: Path, tokenizer: Path) -> list[str]:
    decoder = load_tokenizer(tokenizer)
    index = read_index(prefix)
    ids = memoryview(with_suffix(prefix, ".bin").read_bytes()).cast("H")
    found = []
    for start, length in zip((index.offsets // 2).tolist(), index.lengths.tolist(), strict=True):
        assert ids[start + length - 1] == decoder.eod
        found.append(decoder.decode(ids[start : start + length - 1].tolist()))
    return found


FILTERS = {"exact_dedup": True, "min_characters": 60}


def test_same_bytes_however_the_work_is_shared(root: Path) -> None:
    """One process or two, small shards or large, one machine or four that merge at the end."""
    (root / "web" / "3.jsonl").write_text("not json\n" + lines(range(30, 40)))
    common: dict[str, Any] = {"filters": FILTERS, "max_prefix_tokens": 9000, "max_fault_rate": 0.1}
    run(root, "one", **common)
    run(root, "two", workers=2, **common)
    run(root, "large", shard_bytes=10**9, **common)
    recipe = load_data_recipe(recipe_file(root, "many", **common))
    for number in (3, 0, 2, 1):
        assert prepare(recipe, Lines(), workers=1, shard=(number, 4)) == []
        states = {entry.name: entry.state for entry in status(recipe)}
        assert "to merge" not in states.values() or number == 1
    merge_all(recipe, Lines(), workers=2)
    assert {entry.state for entry in status(recipe)} == {"ready"}
    alone = content(root, "one")
    assert len([name for name in alone if name.startswith("web-0")]) >= 4 and "web.faults.jsonl" in alone
    for other in ("two", "large", "many"):
        assert content(root, other) == alone, other
    assert not (root / "one" / ".parts").exists()


def test_duplicates_filters_and_counts(root: Path) -> None:
    said = run(root, "out", filters=FILTERS)
    found: dict[str, list[str]] = {}
    for source in ("web", "more"):
        for split in ("train", "validation"):
            (prefix,) = find_prefixes(root / "out", source, split)
            found.setdefault(source, []).extend(texts(prefix, root / "tokenizer"))
    long = [text(number) for number in range(180) if len(text(number)) >= 60]
    assert sorted(found["web"]) == sorted(item for item in long if item in {text(n) for n in range(120)})
    assert sorted(found["more"]) == sorted(item for item in long if item not in {text(n) for n in range(120)})
    manifest = read_manifest(root / "out" / "more")
    assert manifest is not None
    copies = [text(number) for number in (*range(100, 120), *range(20))]
    counts = manifest["source_counts"]
    assert counts["read"] == 100 and counts["left_out"]["duplicate"] == sum(len(item) >= 60 for item in copies)
    assert counts["left_out"]["short"] == sum(len(text(n)) < 60 for n in (*range(100, 180), *range(20)))
    assert [unit["documents"] for unit in manifest["units"]] and len({u["digest"] for u in manifest["units"]}) > 1
    assert any("duplicates left out" in line for line in said)


def test_a_source_that_is_added_later_is_compared_with_the_finished(root: Path) -> None:
    sources = [{"name": name, "kind": "jsonl", "path": str(root / name), "key": "url"} for name in ("web", "more")]
    run(root, "both", filters=FILTERS)
    run(root, "out", filters=FILTERS, sources=sources[:1])
    assert "web: up to date" in run(root, "out", filters=FILTERS)
    assert content(root, "out") == content(root, "both")
    # Without the hashes a finished result stays finished; they are made again when another source asks for them.
    for file in (root / "out" / ".hashes").iterdir():
        file.unlink()
    assert {"web: up to date", "more: up to date"} <= set(run(root, "out", filters=FILTERS))
    (root / "more" / "2.jsonl").write_text(lines(range(50, 60)))
    assert "web: up to date" not in run(root, "out", filters=FILTERS)
    run(root, "fresh", filters=FILTERS)
    assert content(root, "out") == content(root, "fresh")


def test_decontamination(root: Path) -> None:
    (root / "questions.txt").write_text(" ".join(text(7).split()[:9]) + "\n")
    run(root, "out", filters={"decontaminate": {"files": [str(root / "questions.txt")], "ngram": 8}})
    kept = [item for split in ("web", "web-validation") for item in texts(root / "out" / split, root / "tokenizer")]
    assert text(7) not in kept and len(kept) == 119
    manifest = read_manifest(root / "out" / "web")
    assert manifest is not None and manifest["source_counts"]["left_out"] == {"contaminated": 1}
    # Other questions, other data.
    (root / "questions.txt").write_text(" ".join(text(8).split()[:9]) + "\n")
    assert "web: up to date" not in run(
        root, "out", filters={"decontaminate": {"files": [str(root / "questions.txt")], "ngram": 8}}
    )


def test_several_pairs_fill_up_to_the_limit(root: Path) -> None:
    run(root, "whole")
    run(root, "parts", max_prefix_tokens=5000, max_prefix_documents=40)
    prefixes = find_prefixes(root / "parts", "web", "train")
    assert [prefix.name for prefix in prefixes] == [f"web-{i:05d}-of-{len(prefixes):05d}" for i in range(len(prefixes))]
    joined = b"".join(with_suffix(prefix, ".bin").read_bytes() for prefix in prefixes)
    assert joined == (root / "whole" / "web.bin").read_bytes()
    found = [stats(prefix) for prefix in prefixes]
    assert len(found) > 2 and all(item.tokens <= 5000 and item.documents <= 40 for item in found)
    for now, after in pairwise(found):
        assert now.documents == 40 or now.tokens + int(after.lengths[0]) > 5000
    assert all("equals its manifest" in verify(prefix) for prefix in prefixes)
    # Another limit: the pairs of before are gone.
    run(root, "parts")
    assert find_prefixes(root / "parts", "web", "train") == [root / "parts" / "web"]
    assert not list((root / "parts").glob("web-0*"))


def test_a_document_beyond_the_limit_has_a_pair_of_its_own(root: Path) -> None:
    sources = [{"name": "few", "kind": "jsonl", "path": str(root / "few.jsonl")}]
    (root / "few.jsonl").write_text(lines(range(5)))
    run(root, "parts", max_prefix_tokens=3, sources=sources, validation_fraction=0)
    assert [stats(prefix).documents for prefix in find_prefixes(root / "parts", "few", "train")] == [1] * 5


def test_more_pairs_than_a_blend_holds(root: Path) -> None:
    """Known before a pair is written; shards stay, so that other limits need no tokenising."""
    (root / "many.jsonl").write_text('{"text": "a b"}\n' * 32_767)
    sources = [{"name": "many", "kind": "jsonl", "path": str(root / "many.jsonl")}]
    common: dict[str, Any] = {"sources": sources, "validation_fraction": 0, "shard_bytes": 200_000}
    with pytest.raises(DataError, match="32,767 pairs; a blend takes 32,766 at most"):
        run(root, "many", max_prefix_documents=1, **common)
    assert not list((root / "many").glob("many*"))
    shards = {path: path.stat().st_mtime_ns for path in (root / "many" / ".parts").glob("many/*/done.json")}
    assert len(shards) == 3
    load = load_data_recipe(recipe_file(root, "many", max_prefix_documents=20_000, keep_parts=True, **common))
    prepare(load, Lines(), workers=1)
    assert [stats(prefix).documents for prefix in find_prefixes(root / "many", "many", "train")] == [20_000, 12_767]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in shards.items())


def test_pairs_of_all_sources_count_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(run(root, "out", max_prefix_documents=50) and list((root / "out").glob("*.bin")))
    assert whole > 6
    for most in (whole, whole - 1):
        monkeypatch.setattr("data_prep.prepare.MAX_BLEND", most)
        if most == whole:
            run(root, "fits", max_prefix_documents=50)
            assert len(list((root / "fits").glob("*.bin"))) == whole
            continue
        with pytest.raises(DataError, match=f"{whole} pairs; a blend takes {most} at most"):
            run(root, "over", max_prefix_documents=50)
        assert not list((root / "over").glob("*.idx"))
    with pytest.raises(DataError, match="max_prefix_documents"):  # Megatron's document index is int32
        run(root, "out", max_prefix_documents=2**31)


def test_faults_within_the_budget_are_written_down(root: Path) -> None:
    bad = ["{broken", '{"body": "no text"}', '{"text": 5}', '"a string"', '{"text": "\\ud800 half"}']
    (root / "web" / "3.jsonl").write_bytes(
        "\n".join(bad).encode() + b'\n{"text": "\xff\xfe"}\n' + lines(range(20)).encode()
    )
    run(root, "out", max_fault_rate=0.1, workers=2)
    manifest = read_manifest(root / "out" / "web")
    assert manifest is not None and manifest["source_counts"]["faults"] == 6
    faults = [json.loads(line) for line in (root / "out" / "web.faults.jsonl").read_text().splitlines()]
    assert len(faults) == 6 and all(fault["path"].endswith("3.jsonl") and fault["where"] for fault in faults)
    assert not (root / "out" / "more.faults.jsonl").exists()
    with pytest.raises(DataError, match=r"source web: 6 of \d+ records.*max_fault_rate is 0\.01(.|\n)*3\.jsonl, "):
        run(root, "strict", max_fault_rate=0.01)
    listed = (root / "strict" / "web.faults.jsonl").read_text()
    assert listed == (root / "out" / "web.faults.jsonl").read_text()
    # The mended file is enough to go on; what was finished is kept.
    (root / "web" / "3.jsonl").write_text(lines(range(20)))
    run(root, "strict", max_fault_rate=0.01)
    assert not (root / "strict" / "web.faults.jsonl").exists()


@pytest.mark.parametrize("name", ["1.jsonl.gz", "2.jsonl.zst"])
def test_a_file_that_was_cut(root: Path, name: str) -> None:
    file = root / "web" / name
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"1 of 3 files cannot be read to their end(.|\n)*{name}"):
        run(root, "out", max_fault_rate=0.3)
    run(root, "out", max_fault_rate=0.34)
    manifest = read_manifest(root / "out" / "web")
    assert manifest is not None and manifest["source_counts"]["cut_files"] == [str(file)]
    assert 90 <= manifest["source_counts"]["read"] < 120


def test_new_files_are_enough_when_parts_are_kept(root: Path) -> None:
    run(root, "out", keep_parts=True)
    before = {file: file.stat().st_mtime_ns for file in (root / "out" / ".parts").rglob("*.bin")}
    (root / "web" / "9.jsonl").write_text(lines(range(300, 320)))
    run(root, "out", keep_parts=True)
    after = {file: file.stat().st_mtime_ns for file in (root / "out" / ".parts").rglob("*.bin")}
    assert before.items() <= after.items() and len(after) > len(before)
    run(root, "fresh")
    assert content(root, "fresh") == content(root, "out")


def test_merge_before_all_is_there(root: Path) -> None:
    recipe = load_data_recipe(recipe_file(root, "out"))
    prepare(recipe, Lines(), workers=1, shard=(1, 3))
    with pytest.raises(DataError, match=r"of \d+ shards are not tokenised yet(.|\n)*web: .*0\.jsonl"):
        merge_all(recipe, Lines(), workers=1)


def test_two_runs_at_once(root: Path) -> None:
    from data_prep.lock import locked

    with locked(root / "out" / ".parts", shared=True):
        recipe = load_data_recipe(recipe_file(root, "out"))
        with pytest.raises(DataError, match="another `ouro data` run"):
            prepare(recipe, Lines(), workers=1)
        prepare(recipe, Lines(), workers=1, shard=(0, 2))


def test_conversations(root: Path) -> None:
    write_chat_tokenizer(root / "chatty")
    rows = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}
        for n in range(30)
    ]
    (root / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": []}\n')
    sources = [{"name": "talk", "kind": "chat", "path": str(root / "talk.jsonl")}]
    tokenizer = {"kind": "existing", "path": str(root / "chatty")}
    run(root, "out", sources=sources, tokenizer=tokenizer, validation_fraction=0, max_fault_rate=0.1)
    found = stats(root / "out" / "talk")
    assert found.documents == 30 and 0 < found.counted < found.tokens
    assert "count in the loss" in verify(root / "out" / "talk")
    decoder = load_tokenizer(root / "chatty")
    mask = (root / "out" / "talk.loss.bin").read_bytes()
    ids = memoryview((root / "out" / "talk.bin").read_bytes()).cast("H").tolist()
    learned = decoder.decode([token for token, counts in zip(ids, mask, strict=True) if counts], skip_special=True)
    assert "say 0" in learned and "say 29" in learned and "ask" not in learned
    # The tokenizer of the other tests has no special tokens for turns.
    with pytest.raises(DataError, match="chat template"):
        run(root, "other", sources=sources)


def test_nothing_left(root: Path) -> None:
    with pytest.raises(DataError, match=r"web: no document is left.*read 120; left out, short 120"):
        run(root, "out", filters={"min_characters": 10**6})


def test_a_full_disk_loses_nothing_that_was_finished(root: Path) -> None:
    """A limit on the size of files stands for the full disk: the merged pair does not fit, the shards do."""
    file = recipe_file(root, "out", validation_fraction=0)
    limited = f"ulimit -f 14; exec {shlex.quote(str(OURO))} data prepare {file} --workers 2"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stderr and "run it again" in done.stderr
    assert not list((root / "out").glob("*.bin")) and list((root / "out").glob(".parts/web/*/done.json"))
    lines = Lines()
    prepare(load_data_recipe(file), lines, workers=1)
    assert not any("tokenising" in line for line in lines.lines)
    run(root, "fresh", validation_fraction=0)
    assert content(root, "fresh") == content(root, "out")


def test_killed_again_and_again(root: Path) -> None:
    """All processes at once, at random moments; in the end the result is that of a run nobody disturbed."""
    for number in range(10, 40):
        (root / "web" / f"{number}.jsonl").write_text(lines(range(number * 20, number * 20 + 20)))
    common: dict[str, Any] = {"filters": FILTERS, "max_prefix_tokens": 20000}
    file = recipe_file(root, "killed", **common)
    command = [str(OURO), "data", "prepare", str(file), "--workers", "2"]
    generator = random.Random(1)
    finished: set[Path] = set()
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            now = set((root / "killed").glob(".parts/*/*/done.json"))
            if len(now) > len(finished):
                break
            time.sleep(0.01)
        time.sleep(generator.random() * 0.3)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        now = set((root / "killed").glob(".parts/*/*/done.json"))
        assert finished <= now or not now
        finished = now
    assert killed and not list((root / "killed").glob("*.manifest.json.part"))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
    run(root, "calm", **common)
    assert content(root, "killed") == content(root, "calm")
