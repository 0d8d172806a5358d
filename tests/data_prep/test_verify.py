"""One wrong byte anywhere in a pair is found and named."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.merge import write_json
from data_prep.verify import verify
from data_prep.writer import LOSS_SUFFIX, PairWriter, token_dtype
from ouro_megatron.data.indexed import HEADER, sha256_of, with_suffix
from ouro_megatron.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    prefix = tmp_path / "web.v1"
    with PairWriter(prefix, token_dtype(100), count_vocab=100) as pair:
        pair.add_many(np.arange(60), np.array([10, 20, 30]), np.arange(60) % 3 > 0)
    manifest = {"documents": 3, "tokens": 60, "tokenizer": {"vocab": 100}}
    for suffix, name in ((".bin", "bin"), (".idx", "idx"), (LOSS_SUFFIX, "loss")):
        file = with_suffix(prefix, suffix)
        manifest[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(with_suffix(prefix, ".manifest.json"), manifest)
    return prefix


def put(prefix: Path, suffix: str, offset: int, content: bytes) -> None:
    with with_suffix(prefix, suffix).open("r+b") as file:
        file.seek(offset)
        file.write(content)


def manifest(prefix: Path, **changes: object) -> None:
    path = with_suffix(prefix, ".manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_whole(prefix: Path) -> None:
    assert "equals its manifest (3 documents, 60 tokens, highest id 59, 40 tokens count in the loss)" in verify(prefix)
    with_suffix(prefix, ".manifest.json").unlink()
    assert "no manifest" in verify(prefix)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: put(p, ".bin", 20, struct.pack("<H", 100)), r"web\.v1\.bin: token 10 \(sequence 1\) is id 100.*100"),
        (lambda p: put(p, ".bin", 20, struct.pack("<H", 99)), r"web\.v1\.bin: its content"),
        (
            lambda p: put(p, ".idx", HEADER.size + 12, struct.pack("<q", 2)),
            r"web\.v1\.idx: sequence 0 begins at byte 2",
        ),
        (lambda p: put(p, ".idx", HEADER.size + 36 + 8, struct.pack("<q", 3)), r"document 1 ends before it begins"),
        (lambda p: put(p, ".idx", HEADER.size, struct.pack("<i", -1)), r"sequence 0 has a negative length"),
        (lambda p: put(p, LOSS_SUFFIX, 7, b"\x02"), r"loss\.bin: byte 7 is 2"),
        (lambda p: put(p, LOSS_SUFFIX, 3, b"\x01"), r"loss\.bin: its content"),
        (lambda p: put(p, LOSS_SUFFIX, 60, b"\x01"), r"loss\.bin: 61 bytes for 60 tokens"),
        (lambda p: with_suffix(p, LOSS_SUFFIX).unlink(), r"loss\.bin: missing"),
        (lambda p: put(p, ".bin", 120, b"\x01\x00"), r"\.bin: too long"),
        (lambda p: manifest(p, documents=4), r"3 documents, its manifest says 4"),
        (lambda p: manifest(p, tokens=61), r"60 tokens, its manifest says 61"),
    ],
)
def test_broken(prefix: Path, break_it: Callable[[Path], None], words: str) -> None:
    break_it(prefix)
    with pytest.raises(DataError, match=words):
        verify(prefix)


def test_a_mask_of_another_pair(prefix: Path) -> None:
    content = json.loads(with_suffix(prefix, ".manifest.json").read_text())
    del content["loss"]
    with_suffix(prefix, ".manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"loss\.bin: its manifest knows nothing of it"):
        verify(prefix)
