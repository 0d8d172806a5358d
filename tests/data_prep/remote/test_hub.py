"""Datasets of the Hub: a small server of its interface on this machine, read through huggingface_hub and `datasets`."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pytest

from data_prep.formats import remote
from data_prep.formats.files import find_files, open_file
from data_prep.prepare import load_data_recipe, prepare
from ouro_megatron.errors import DataError
from tests.data_prep.remote.hub import Hub, Repository, running_hub
from tests.data_prep.remote.preparing import Corpora, kill_command, make_corpora, outputs, run_command, run_here
from tests.data_prep.sources.reading import read_all, source_of
from tests.data_prep.test_prepare import Lines

URL = "hf://datasets/acme/corpora"


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def corpora(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    made = make_corpora(tmp_path_factory.mktemp("hub"))
    served.datasets["acme/corpora"] = Repository({"main": made.folder, "refs/convert/parquet": made.folder})
    return made


@pytest.fixture
def hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server as this process's Hub, nobody logged in, empty caches. The variable was read at the import."""
    constants = huggingface_hub.constants
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(remote, "_FIRST_PATIENCE", 0.3)
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    yield served
    fsspec.get_filesystem_class("hf").clear_instance_cache()


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """For a process that takes the server for the Hub."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": ""}


def prepared(recipe: Path) -> list[str]:
    lines = Lines()
    prepare(load_data_recipe(recipe), lines, workers=1)
    return lines.lines


def jsonl(path: str) -> list[dict[str, Any]]:
    return [{"name": "web", "kind": "jsonl", "path": path}]


def test_killed_and_resumed_it_gives_the_bytes_of_local_files(hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    recipe = corpora.recipe(tmp_path / "out", corpora.sources(URL), keep_parts=True)
    finished = kill_command(recipe, environment(hub, tmp_path), shards=2)
    result = run_here(recipe)
    assert result.exit_code == 0, result.exception
    assert outputs(tmp_path / "out") == corpora.expected
    assert {mark: mark.stat().st_mtime_ns for mark in finished} == finished
    assert run_here(recipe).output.count("up to date") == len(corpora.made)


def test_a_revision_is_kept_to(hub: Hub, tmp_path: Path) -> None:
    for name, text in (("old", "as it was"), ("new", "as it is")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "a.jsonl").write_text(f'{{"text": "{text}"}}\n')
    hub.datasets["acme/two"] = Repository({"main": tmp_path / "new", "v1": tmp_path / "old", "pr/1": tmp_path / "old"})

    def texts(revision: str) -> list[str]:
        source = {"kind": "jsonl", "path": f"hf://datasets/acme/two{revision}/data"}
        assert all(unit.path == f"{source['path']}/a.jsonl" for unit in source_of(source).units(1 << 20))
        return [document.text for document in read_all(source)[0]]

    assert texts("") == texts("@main") == ["as it is"]
    assert texts("@v1") == texts("@pr%2F1") == ["as it was"]


def test_a_dataset_that_moves_on_is_read_again(hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"text": "first"}\n')
    hub.datasets["acme/moving"] = Repository({"main": tmp_path / "raw"})
    recipe = corpora.recipe(tmp_path / "out", jsonl("hf://datasets/acme/moving"), validation_fraction=0)
    prepared(recipe)
    assert any("web: up to date" in line for line in prepared(recipe))
    (tmp_path / "raw" / "a.jsonl").write_text('{"text": "other"}\n')
    assert not any("up to date" in line for line in prepared(recipe))


def test_an_answer_503_is_asked_for_again(hub: Hub, corpora: Corpora) -> None:
    file = corpora.folder / "jsonl" / "raw" / "a.jsonl"
    hub.failures = 1
    with open_file(f"{URL}/jsonl/raw/a.jsonl", {}) as stream:
        assert stream.read() == file.read_bytes()
    assert hub.failures == 0


def test_only_what_is_asked_for_is_read(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(12 << 20))
    hub.datasets["acme/large"] = Repository({"main": tmp_path})
    before = len(hub.requests)
    with open_file("hf://datasets/acme/large/large.bin", {"block_size": 1 << 20}) as stream:
        stream.seek(-8, 2)
        assert stream.read() == bytes(8)
    ranges = [request.split()[-1] for request in hub.requests[before:] if "resolve" in request]
    assert ranges == [f"bytes={(12 << 20) - 8}-{(12 << 20) - 1}"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "datasets/acme/nowhere/x",
            r"the Hub has no datasets/acme/nowhere, or it is private: log in with `hf auth log",
        ),
        ("datasets/acme/private/x", r"the Hub has no datasets/acme/private, or it is private: .*set HF_TOKEN"),
        ("datasets/acme/corpora@v9/x", r"datasets/acme/corpora has no such revision"),
        ("datasets/acme/corpora/nope", r"source web: hf://datasets/acme/corpora/nope is no file, and no file below"),
        ("acme/corpora/jsonl", r"the Hub has no acme/corpora, .*datasets are written hf://datasets/OWNER/NAME"),
        ("acme", r"hf://acme: .*must be 'namespace/name'"),
    ],
)
def test_what_is_not_there(path: str, words: str, hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    hub.datasets["acme/private"] = Repository({"main": corpora.folder}, frozenset({"mine"}), private=True)
    with pytest.raises(DataError, match=words) as caught:
        prepared(corpora.recipe(tmp_path / "out", jsonl(f"hf://{path}")))
    assert "\n" not in str(caught.value)


def test_gated_and_private_datasets(
    hub: Hub, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.datasets["acme/gated"] = Repository({"main": corpora.folder}, frozenset({"accepted"}))
    hub.datasets["acme/private"] = Repository({"main": corpora.folder}, frozenset({"accepted"}), private=True)
    url = "hf://datasets/acme/gated/jsonl/raw"
    recipe = corpora.recipe(tmp_path / "out", jsonl(url))
    gated = rf"{url}/a\.jsonl: gated: accept its terms at {hub.url}/datasets/acme/gated .*`hf auth login`.*HF_TOKEN"
    for token in ("", "of somebody else"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(DataError, match=gated):
            prepared(recipe)
    monkeypatch.setenv("HF_TOKEN", "accepted")
    prepared(recipe)
    assert find_files("x", "hf://datasets/acme/private", "jsonl/**/*.gz", {})


def test_the_command_says_it_once(hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    recipe = corpora.recipe(tmp_path / "out", jsonl("hf://datasets/acme/nowhere/x"))
    result = run_command(recipe, environment(hub, tmp_path))
    assert result.returncode == DataError.exit_code
    assert result.stderr.count("hf://datasets/acme/nowhere/x") == 1 and "Traceback" not in result.stderr


def test_a_hub_that_does_not_answer(hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    with running_hub() as stopped:
        pass
    source = {**jsonl(URL)[0], "storage_options": {"endpoint": stopped.url}}
    with pytest.raises(DataError, match=r"cannot be listed, tried .*: ConnectError: "):
        prepared(corpora.recipe(tmp_path / "out", [source]))


def test_the_datasets_library_by_a_hub_id(hub: Hub, corpora: Corpora, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(corpora.folder / "parquet" / "raw", raw)
    hub.datasets["acme/table"] = Repository({"main": raw, "v1": raw})
    settings = {"kind": "datasets", "path": "acme/table", "key": "url"}
    documents, faults = read_all(settings)
    expected, _ = read_all(corpora.made["parquet"].settings)
    assert [(d.text, d.key) for d in documents] == [(d.text, d.key) for d in expected] and not faults
    # A unit names the commit that it was listed at, whatever the branch is at when it is read.
    (main, *_), (tagged, *_) = (source_of({**settings, **more}).units(1) for more in ({}, {"revision": "v1"}))
    commits = [re.fullmatch(r"hf://datasets/acme/table@([0-9a-f]{40})/.*parquet", unit.path) for unit in (main, tagged)]
    assert all(commits) and main.path != tagged.path
    # What a service refuses is no fault of a file, which a run would go on without.
    hub.datasets["acme/table"].readers = frozenset()
    with pytest.raises(DataError, match=r"acme/table.*: gated: accept its terms"):
        list(source_of(settings).read(main, list[Any]().append))


def test_a_dataset_that_the_library_reads(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,url\none,u1\ntwo,u2\n")
    hub.datasets["acme/csv"] = Repository({"main": tmp_path})
    settings = {"kind": "datasets", "path": "acme/csv"}
    documents, faults = read_all(settings)
    assert [(d.text, d.key) for d in documents] == [("one", "u1"), ("two", "u2")] and not faults
    (unit,) = source_of(settings).units(1)
    assert unit.path == "acme/csv" and len(unit.stamp) == 40
    hub.datasets["acme/csv"].readers = frozenset()
    with pytest.raises(DataError, match=r"acme/csv.*: gated: accept its terms"):
        list(source_of(settings).read(unit, list[Any]().append))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme/nowhere", "cannot open 'acme/nowhere' .*: the Hub has no datasets/acme/nowhere, or it is private"),
        ("acme/closed", "cannot open 'acme/closed' .*: gated: accept its terms at .*/datasets/acme/closed"),
    ],
)
def test_the_datasets_library_is_refused(name: str, words: str, hub: Hub, corpora: Corpora) -> None:
    hub.datasets["acme/closed"] = Repository({"main": corpora.folder / "parquet"}, frozenset({"accepted"}))
    with pytest.raises(DataError, match=words) as caught:
        source_of({"kind": "datasets", "path": name}).units(1)
    assert "\n" not in str(caught.value)
