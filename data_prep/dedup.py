"""Exact duplicates over all shards of all sources: the first document of a text stays, the others are left out.

Each shard leaves its documents' hashes sorted, so that the hashes of one range are one piece of each file; ranges are
worked through one after the other and memory does not grow with the corpus. Which document is the first follows from
the order of sources, units and documents alone, never from which worker was done first.
"""

import json
import os
import shutil
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ouro_megatron.data.indexed import with_suffix

HASH_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])
"""128 bits of a document's hash and its number in the shard, both splits together."""
_RANGE_DOCUMENTS = 16_000_000
"""Documents whose hashes are compared at one time (about 1 GB)."""


def save_sorted(raw: Path, path: Path, at_once: int = _RANGE_DOCUMENTS) -> None:
    """Turns 16-byte hashes in the order of the documents into HASH_DTYPE rows sorted by hash; appears whole."""
    count = raw.stat().st_size // 16
    hashes = np.memmap(raw, dtype=">u8", mode="r").reshape(-1, 2) if count else np.zeros((0, 2), dtype=">u8")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = with_suffix(path, f".part-{socket.gethostname()}-{os.getpid()}")
    with partial.open("wb") as file:
        for low, high in _ranges(count, at_once):
            rows = np.concatenate(
                [_rows(hashes, start, at_once, low, high) for start in range(0, max(count, 1), at_once)]
            )
            file.write(rows[np.lexsort((rows["number"], rows["low"], rows["high"]))].tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _rows(hashes: np.ndarray, start: int, size: int, low: int, high: int) -> np.ndarray:
    piece = np.asarray(hashes[start : start + size]).astype("<u8")
    inside = np.flatnonzero((piece[:, 0] >= low) & (piece[:, 0] <= high))
    rows = np.zeros(len(inside), dtype=HASH_DTYPE)
    rows["high"], rows["low"], rows["number"] = piece[inside, 0], piece[inside, 1], start + inside
    return rows


def _ranges(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Closed ranges of the upper 64 bits that hold about `at_once` of `count` evenly spread hashes each."""
    pieces = max(1, -(-count // at_once))
    bounds = [2**64 * piece // pieces for piece in range(pieces + 1)]
    for low, high in pairwise(bounds):
        yield low, high - 1


def find_duplicates(shards: Sequence[Path], folder: Path, at_once: int = _RANGE_DOCUMENTS) -> None:
    """Makes `folder` with N.npy for shard N (sorted int64 numbers of its documents to leave out); whole or not at all.

    `shards`: the files of `save_sorted`, in the order that decides which document is the first.
    """
    partial = folder.with_name(f"{folder.name}.part-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = [_open(path) for path in shards]
    for low, high in _ranges(sum(map(len, rows)), at_once):
        for shard, numbers in _duplicates(rows, low, high):
            with (partial / f"{shard}.raw").open("ab") as file:
                file.write(numbers.astype("<i8").tobytes())
    found = {}
    for path in sorted(partial.glob("*.raw")):
        numbers = np.sort(np.fromfile(path, dtype="<i8"))
        np.save(path.with_suffix(".npy"), numbers)
        found[path.stem] = len(numbers)
        path.unlink()
    (partial / "counts.json").write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def duplicates_of(folder: Path, shard: int) -> np.ndarray:
    """Sorted int64 numbers of a shard's documents to leave out."""
    path = folder / f"{shard}.npy"
    return np.load(path) if path.exists() else np.zeros(0, dtype=np.int64)


def _open(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=HASH_DTYPE)
    return np.memmap(path, dtype=HASH_DTYPE, mode="r")


def _high(row: np.void) -> int:
    return int(row["high"])


def _duplicates(shards: Sequence[np.ndarray], low: int, high: int) -> Iterator[tuple[int, np.ndarray]]:
    pieces, owners = [], []
    for number, rows in enumerate(shards):
        # numpy's own search would read the whole column first.
        start = bisect_left(rows, low, key=_high)
        stop = bisect_right(rows, high, key=_high)
        pieces.append(np.asarray(rows[start:stop]))
        owners.append(np.full(stop - start, number, dtype=np.int32))
    together, owner = np.concatenate(pieces), np.concatenate(owners)
    # The sort is stable and the shards come in order: the first of equal hashes is the one that stays.
    order = np.lexsort((together["low"], together["high"]))
    together, owner = together[order], owner[order]
    same = np.zeros(len(together), dtype=bool)
    same[1:] = (together["high"][1:] == together["high"][:-1]) & (together["low"][1:] == together["low"][:-1])
    together, owner = together[same], owner[same]
    by_owner = np.argsort(owner, kind="stable")
    together, owner = together[by_owner], owner[by_owner]
    bounds = [0, *(np.flatnonzero(owner[1:] != owner[:-1]) + 1).tolist(), len(owner)]
    for begin, end in pairwise(bounds):
        if end > begin:
            yield int(owner[begin]), together["number"][begin:end].astype(np.int64)
