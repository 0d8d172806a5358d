"""Corpora of many kinds through the whole pipeline: the same bytes however often it is killed, every document once,
damaged files within a budget."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.fixtures import Made, make_fixture
from data_prep.look import stats
from data_prep.prepare import load_data_recipe, prepare
from ouro_megatron.data.indexed import read_index
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError
from tests.data_prep.test_prepare import Lines

KINDS = ("nemotron_cc", "map_cc", "parquet", "opencoder_annealing", "prolong", "nemotron_sft_general", "sft_mix")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Made]]:
    root = tmp_path_factory.mktemp("corpora")
    return root, {kind: make_fixture(kind, root / kind) for kind in KINDS}


def recipe_file(folder: Path, sources: list[dict[str, Any]], **more: Any) -> Path:
    values = {
        "output": str(folder),
        "tokenizer": {"kind": "train", "vocab": 500, "special_tokens": ["<|im_start|>", "<|im_end|>"]},
        "validation_fraction": 0.25,
        "sources": sources,
        **more,
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values))
    return file


def settings_of(made: dict[str, Made]) -> list[dict[str, Any]]:
    return [{"name": kind, **fixture.settings} for kind, fixture in made.items()]


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def texts_of(folder: Path, name: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for prefix in (folder / name, folder / f"{name}-validation"):
        ids, index = prefix.with_name(prefix.name + ".bin").read_bytes(), read_index(prefix)
        for offset, length in zip(index.offsets.tolist(), index.lengths.tolist(), strict=True):
            tokens = memoryview(ids)[offset : offset + 2 * length].cast("H").tolist()
            found.append(tokenizer.decode(tokens[:-1]))
    return found


def test_killed_and_resumed_on_other_shards_gives_the_same_bytes(corpora: tuple[Path, dict[str, Made]]) -> None:
    root, made = corpora
    alone = recipe_file(root / "alone", settings_of(made), shard_bytes=1_000_000)
    prepare(load_data_recipe(alone), Lines(), workers=1)
    killed = recipe_file(
        root / "killed",
        settings_of(made),
        shard_bytes=1000,
        tokenizer={"kind": "existing", "path": str(root / "alone" / "tokenizer")},
    )
    command = [sys.executable, "-c", "from ouro_megatron.cli.main import main; main()"]
    process = subprocess.Popen([*command, "data", "prepare", str(killed), "--workers", "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((root / "killed" / ".parts").glob("*/*/done.json"))) < 4:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            break  # it was quicker; what follows then checks a finished run
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    prepare(load_data_recipe(killed), Lines(), workers=2)
    assert outputs(root / "killed") == outputs(root / "alone")
    # .bin and .idx of two splits each, and the loss masks of the two sets of conversations.
    assert len(outputs(root / "alone")) == 4 * len(KINDS) + 4


def test_every_document_comes_out_once(corpora: tuple[Path, dict[str, Made]]) -> None:
    root, made = corpora
    folder = root / "alone"
    prepare(load_data_recipe(recipe_file(folder, settings_of(made), shard_bytes=1_000_000)), Lines(), workers=1)
    for kind, fixture in made.items():
        if not fixture.conversations:
            assert sorted(texts_of(folder, kind)) == sorted(fixture.texts), kind
        count = sum(stats(folder / name).documents for name in (kind, f"{kind}-validation"))
        assert count == len(fixture.texts) + len(fixture.conversations)
    assert (folder / "sft_mix.loss.bin").stat().st_size == stats(folder / "sft_mix").tokens
    # What merely spells the end of a document stays text.
    assert any("<|endoftext|>" in text for text in texts_of(folder, "nemotron_cc"))


def test_a_cut_file_is_listed_and_stops_the_run_or_does_not(tmp_path: Path) -> None:
    made = make_fixture("nemotron_cc", tmp_path / "raw")
    file = sorted(Path(made.settings["path"]).rglob("*.zstd"))[0]
    file.write_bytes(file.read_bytes()[:-9])
    sources = [{"name": "cc", **made.settings}]
    with pytest.raises(DataError, match=rf"1 of 11 files cannot be read to their end.*(?s:.*){file.name}.*cut off"):
        prepare(load_data_recipe(recipe_file(tmp_path / "out", sources)), Lines(), workers=1)
    prepare(load_data_recipe(recipe_file(tmp_path / "out", sources, max_fault_rate=0.2)), Lines(), workers=1)
    documents = sum(stats(tmp_path / "out" / name).documents for name in ("cc", "cc-validation"))
    assert 60 <= documents < 66
    assert file.name in (tmp_path / "out" / "cc.faults.jsonl").read_text()
