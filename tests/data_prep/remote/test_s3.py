"""Corpora in S3: a real server (moto) on this machine, read through s3fs and botocore."""

import json
import logging
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from data_prep.formats import remote
from data_prep.formats.files import find_files, open_file
from data_prep.formats.gzip_parts import GzipParts
from data_prep.prepare import load_data_recipe, prepare
from ouro_megatron.errors import DataError
from tests.data_prep.remote.preparing import Corpora, kill_command, make_corpora, outputs, run_here
from tests.data_prep.test_prepare import Lines

ROW = json.dumps({"text": "a document of the bucket"}).encode() + b"\n"


class Bucket:
    """One bucket of a server that this process runs."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._start(0)
        self.files = fsspec.filesystem("s3", endpoint_url=self.endpoint, key="k", secret="s", use_listings_cache=False)
        self.files.mkdir("bucket")

    def _start(self, port: int) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that reads from the server."""
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def put(self, name: str, content: bytes) -> str:
        self.files.pipe(f"bucket/{name}", content)
        return f"s3://bucket/{name}"

    def stop(self) -> None:
        self._server.stop()

    def start_again(self) -> None:
        self._start(self.port)

    def only_known_keys(self, wanted: bool) -> None:
        """Whether the keys of a request must be those of a user, of whom there is none."""
        url, allowed = f"{self.endpoint}/moto-api/reset-auth", b"0" if wanted else b"inf"
        urllib.request.urlopen(urllib.request.Request(url, allowed, {"Content-Type": "text/plain"}, method="POST"))


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.stop()


@pytest.fixture
def bucket(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The server with this process's environment set to it, and short patience."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.05)
    monkeypatch.setattr(remote, "_FIRST_PATIENCE", 0.5)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one that is kept has read the environment already
    yield served
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def corpora(served: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    made = make_corpora(tmp_path_factory.mktemp("s3"))
    served.files.put(f"{made.folder}/", "bucket/corpora/", recursive=True)
    return made


def prepared(recipe: Path) -> list[str]:
    lines = Lines()
    prepare(load_data_recipe(recipe), lines, workers=1)
    return lines.lines


def jsonl(path: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "web", "kind": "jsonl", "path": path, **more}]


def test_killed_and_resumed_it_gives_the_bytes_of_local_files(bucket: Bucket, corpora: Corpora, tmp_path: Path) -> None:
    recipe = corpora.recipe(tmp_path / "out", corpora.sources("s3://bucket/corpora"), keep_parts=True)
    finished = kill_command(recipe, bucket.environment, shards=2)
    result = run_here(recipe)
    assert result.exit_code == 0, result.exception
    assert outputs(tmp_path / "out") == corpora.expected
    assert {mark: mark.stat().st_mtime_ns for mark in finished} == finished
    # Two workers had something to share: files were cut into row groups and byte ranges.
    for kind, files in (("parquet", 2), ("jsonl", 4)):
        assert len(list((tmp_path / "out" / ".parts" / kind).iterdir())) > files, kind
    assert run_here(recipe).output.count("up to date") == len(corpora.made)


def test_one_object_and_a_pattern_of_objects(bucket: Bucket) -> None:
    for name in ("shelf/a.jsonl", "shelf/deep/b.jsonl", "shelf/c.txt", "shelf2/d.jsonl", "shelf/.cache/e.jsonl"):
        bucket.put(name, ROW)
    for name in ("shelf/", "shelf/deep/"):  # what a browser of buckets writes for an empty folder
        bucket.put(name, b"")

    def found(path: str) -> list[str]:
        files = find_files("x", f"s3://bucket/{path}", "**/*.jsonl", {})
        assert all(file.size == len(ROW) and file.stamp for file in files)
        return [file.path.removeprefix("s3://bucket/") for file in files]

    assert found("shelf") == found("shelf/") == found("shelf/**/*.jsonl") == ["shelf/a.jsonl", "shelf/deep/b.jsonl"]
    assert found("shelf*/?.jsonl") == ["shelf/a.jsonl", "shelf2/d.jsonl"]
    assert found("shelf/c.txt") == ["shelf/c.txt"]


def test_an_object_that_was_put_again_is_read_again(bucket: Bucket, corpora: Corpora, tmp_path: Path) -> None:
    bucket.put("news/a.jsonl", ROW * 9)
    recipe = corpora.recipe(tmp_path / "out", jsonl("s3://bucket/news"), validation_fraction=0)
    assert not any("up to date" in line for line in prepared(recipe))
    before = outputs(tmp_path / "out")
    assert any("web: up to date" in line for line in prepared(recipe))
    bucket.put("news/a.jsonl", ROW.replace(b"bucket", b"basket") * 9)
    assert not any("up to date" in line for line in prepared(recipe))
    assert outputs(tmp_path / "out") != before


def test_an_object_that_is_put_again_while_it_is_read(bucket: Bucket) -> None:
    url = bucket.put("large.bin", bytes(3 << 20))
    with open_file(url, {"default_block_size": 1 << 16}) as stream:
        stream.read(100)
        bucket.put("large.bin", b"x" * (3 << 20))
        with pytest.raises(DataError, match=r"large\.bin: was written again while it was being read; run"):
            stream.read()


def test_an_outage_in_the_middle_of_an_object(bucket: Bucket) -> None:
    content = b"".join(number.to_bytes(4, "big") for number in range(1 << 19))
    url = bucket.put("numbers.bin", content)
    with open_file(url, {"default_block_size": 1 << 16}) as stream:
        first = stream.read(100)
        bucket.stop()
        back = threading.Timer(0.3, bucket.start_again)
        back.start()
        rest = stream.read()
        back.join()
    assert first + rest == content


def _without_keys(bucket: Bucket, patched: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patched.delenv(name)
    patched.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    patched.setenv("AWS_CONFIG_FILE", "/nowhere")


def _without_server(bucket: Bucket, patched: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")


def _without_package(bucket: Bucket, patched: pytest.MonkeyPatch) -> None:
    patched.delitem(sys.modules["fsspec.registry"]._registry, "s3")
    patched.setitem(sys.modules, "s3fs", None)


def _nothing(bucket: Bucket, patched: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("nowhere/x", _nothing, r"s3://nowhere/x: .*bucket does not exist \(AWS_ENDPOINT_URL is http://127"),
        ("bucket/nope", _nothing, r"source web: s3://bucket/nope is no file, and no file below it matches"),
        ("bucket/a.jsonl", _without_keys, r"no usable S3 credentials .*set AWS_ACCESS_KEY_ID .*anon: true"),
        ("bucket/a.jsonl", _without_server, r"cannot be listed, tried .*: EndpointConnectionError.* \(AWS_END"),
        ("bucket/a.jsonl", _without_package, r's3fs.*; install it with: pip install "ouro-megatron\[s3\]"'),
    ],
)
def test_what_cannot_be_read(
    path: str,
    change: Callable[[Bucket, pytest.MonkeyPatch], None],
    words: str,
    bucket: Bucket,
    corpora: Corpora,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket.put("a.jsonl", ROW)
    with monkeypatch.context() as patched:
        change(bucket, patched)
        recipe = corpora.recipe(tmp_path / "out", jsonl(f"s3://{path}"))
        with pytest.raises(DataError, match=words) as caught:
            prepared(recipe)
    assert "\n" not in str(caught.value)


def test_keys_that_may_not_read(bucket: Bucket, corpora: Corpora, tmp_path: Path) -> None:
    url = bucket.put("a.jsonl", ROW)
    recipe = corpora.recipe(tmp_path / "out", jsonl(url))
    bucket.only_known_keys(True)
    try:
        with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: S3 denies access \(PermissionError: .*AWS_PROFILE"):
            prepared(recipe)
        with pytest.raises(DataError, match="S3 denies access"):
            open_file(url, {})
    finally:
        bucket.only_known_keys(False)


def test_a_lost_server_is_no_fault_of_a_table(
    bucket: Bucket, corpora: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow hands on what a file raises instead of taking it for damage."""
    (source,) = load_data_recipe(
        corpora.recipe(tmp_path / "out", corpora.sources("s3://bucket/corpora", ("parquet",)))
    ).sources
    unit = source.units(1 << 20)[0]
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    bucket.stop()
    try:
        with pytest.raises(DataError, match=r"\.parquet: cannot be .*, tried .*: EndpointConn"):
            list(source.read(unit, list[Any]().append))
    finally:
        bucket.start_again()


def test_an_index_does_not_lie_beside_a_url(bucket: Bucket) -> None:
    (file,) = find_files("x", bucket.put("a.jsonl.gz", ROW), "", {})
    with pytest.raises(DataError, match="cannot lie beside a URL"):
        GzipParts(file.path, (file,), {}).make_index(lambda done: None)
    assert not Path("s3:").exists()
