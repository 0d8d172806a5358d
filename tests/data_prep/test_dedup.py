"""Exact duplicates against a set, with ranges so small that many are needed."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dedup import HASH_DTYPE, duplicates_of, find_duplicates, save_sorted
from data_prep.shards import content_hash
from data_prep.sources.base import Document


def test_the_hash_of_a_conversation_is_that_of_its_json() -> None:
    """Hashes of earlier runs lie on disk; they are compared with those of today."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": 'a "\\\n é 😀', "n": [1, 2.5, None, True]},
        {"content": {"b": "x", "a": set()}},
    ]
    content = json.dumps(turns, sort_keys=True, ensure_ascii=False, default=str).encode()
    found = content_hash(Document("key", "", messages=turns))
    assert found == (hashlib.blake2b(content, digest_size=16).digest(), len(content))


def write(folder: Path, shards: list[list[int]], at_once: int) -> list[Path]:
    paths = []
    for number, shard in enumerate(shards):
        raw = folder / f"{number}.raw"
        raw.write_bytes(b"".join(hashlib.blake2b(str(item).encode(), digest_size=16).digest() for item in shard))
        paths.append(folder / f"{number}.hashes")
        save_sorted(raw, paths[-1], at_once)
    return paths


@pytest.mark.parametrize("at_once", [7, 1_000_000])
def test_the_first_of_equals_stays(tmp_path: Path, at_once: int) -> None:
    generator = random.Random(3)
    shards = [[generator.randrange(120) for _ in range(generator.randrange(0, 60))] for _ in range(8)]
    shards[3] = []
    paths = write(tmp_path, shards, at_once)
    find_duplicates(paths, tmp_path / "found", at_once)
    seen: set[int] = set()
    dropped = 0
    for number, shard in enumerate(shards):
        expected = []
        for place, item in enumerate(shard):
            if item in seen:
                expected.append(place)
            seen.add(item)
        assert duplicates_of(tmp_path / "found", number).tolist() == expected
        dropped += len(expected)
    assert dropped > 50
    assert not list(tmp_path.glob("*part*"))


def test_rows_are_sorted_and_keep_all_128_bits(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [list(range(500))], at_once=64)
    rows = np.fromfile(path, dtype=HASH_DTYPE)
    keys = [(int(row["high"]) << 64) | int(row["low"]) for row in rows]
    assert keys == sorted(keys) and len(set(keys)) == 500
    digest = hashlib.blake2b(b"17", digest_size=16).digest()
    assert rows["number"][keys.index(int.from_bytes(digest, "big"))] == 17
