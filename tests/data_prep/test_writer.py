"""Pairs against a plain model of them: lists of documents with their masks."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep import writer as module
from data_prep.verify import verify
from data_prep.writer import LOSS_SUFFIX, PairWriter, token_dtype
from ouro_megatron.data.indexed import read_index, with_suffix

Row = tuple[list[int], list[bool]]


def write(prefix: Path, rows: list[Row], *, masked: bool, batch: int = 3) -> PairWriter:
    with PairWriter(prefix, token_dtype(1000), count_vocab=1000) as pair:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            ids = np.array([token for row, _ in some for token in row], dtype=np.uint32)
            loss = np.array([flag for _, flags in some for flag in flags], dtype=bool)
            pair.add_many(ids, np.array([len(row) for row, _ in some]), loss if masked else None)
    return pair


def read(prefix: Path) -> list[Row]:
    index = read_index(prefix)
    ids = np.fromfile(with_suffix(prefix, ".bin"), dtype=index.dtype).tolist()
    loss = with_suffix(prefix, LOSS_SUFFIX)
    flags = np.fromfile(loss, dtype=np.uint8).astype(bool).tolist() if loss.exists() else [True] * len(ids)
    starts = (np.asarray(index.offsets) // index.dtype.itemsize).tolist()
    return [
        (ids[start : start + length], flags[start : start + length])
        for start, length in zip(starts, index.lengths.tolist(), strict=True)
    ]


def rows(seed: int, count: int, *, masked: bool) -> list[Row]:
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        length = generator.randrange(0, 9)
        flags = [generator.random() < 0.5 if masked else True for _ in range(length)]
        made.append(([generator.randrange(1000) for _ in range(length)], flags))
    return made


@pytest.mark.parametrize("piece", [8, 1 << 22])
def test_any_cut_of_pairs_with_and_without_masks(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    first, second, third = rows(1, 20, masked=False), rows(2, 25, masked=True), rows(3, 10, masked=False)
    for name, made in (("a", first), ("b", second), ("c", third)):
        write(tmp_path / name, made, masked=name == "b")
    assert not with_suffix(tmp_path / "a", LOSS_SUFFIX).exists()
    dropped = np.array([0, 5, 6, 24])
    with PairWriter(tmp_path / "all", token_dtype(1000), count_vocab=1000) as pair:
        pair.append(tmp_path / "a", 3, 18)
        pair.append(tmp_path / "b", 0, None, dropped)
        pair.append(tmp_path / "c", 0, 0)
        pair.append(tmp_path / "c")
    expected = first[3:18] + [row for number, row in enumerate(second) if number not in dropped] + third
    assert read(tmp_path / "all") == expected
    ids = [token for row, _ in expected for token in row]
    assert pair.counts is not None and pair.counts.tolist() == np.bincount(ids, minlength=1000).tolist()
    for suffix, digest in pair.hashes.items():
        assert digest == hashlib.sha256(with_suffix(tmp_path / "all", suffix).read_bytes()).hexdigest()
    assert set(pair.hashes) == {".bin", ".idx", LOSS_SUFFIX}
    assert "whole" in verify(tmp_path / "all")
    assert sorted(file.name for file in tmp_path.glob("all*")) == ["all.bin", "all.idx", "all.loss.bin"]


@pytest.mark.parametrize(("vocab", "bytes_of_an_id"), [(65_536, 2), (65_537, 4)])
def test_the_largest_id_of_each_width(tmp_path: Path, vocab: int, bytes_of_an_id: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    with PairWriter(tmp_path / "pair", token_dtype(vocab), count_vocab=vocab) as pair:
        pair.add([0, vocab - 1, 1])
    assert (tmp_path / "pair.bin").stat().st_size == 3 * bytes_of_an_id
    dataset = IndexedDataset(str(tmp_path / "pair"))  # its arrays are views of memory that goes with it
    assert dataset[0].tolist() == [0, vocab - 1, 1]
    assert pair.counts is not None and pair.counts[vocab - 1] == 1


def test_a_mask_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    made = rows(4, 12, masked=False)
    write(tmp_path / "a", made, masked=True)
    write(tmp_path / "b", rows(5, 6, masked=True), masked=True)
    with PairWriter(tmp_path / "c", token_dtype(1000)) as pair:
        pair.append(tmp_path / "a")
        pair.append(tmp_path / "b", 2, 2)
    assert not with_suffix(tmp_path / "a", LOSS_SUFFIX).exists()
    assert read(tmp_path / "c") == made and not with_suffix(tmp_path / "c", LOSS_SUFFIX).exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), PairWriter(tmp_path / "a", token_dtype(1000)) as pair:
        pair.add_many(np.arange(3), np.array([3]), np.array([True, False, True]))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="add up to 4"), PairWriter(tmp_path / "a", token_dtype(10)) as pair:
        pair.add_many(np.arange(3), np.array([4]))
    with pytest.raises(ValueError, match=r"an index holds"), PairWriter(tmp_path / "a", token_dtype(10)) as pair:
        pair.add_many(np.broadcast_to(np.uint8(1), 2**31), np.array([2**31]))


def test_a_short_shard_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "a", [([1, 2, 3], [True] * 3)], masked=False)
    with_suffix(tmp_path / "a", ".bin").write_bytes(b"\x01\x00")
    with pytest.raises(ValueError, match="ends 4 bytes early"), PairWriter(tmp_path / "b", token_dtype(1000)) as pair:
        pair.append(tmp_path / "a")
