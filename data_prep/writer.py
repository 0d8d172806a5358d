"""Writes Megatron's .bin/.idx pairs; the format is described in ouro_megatron/data/indexed.py.

Without Megatron's own builder, so that tokenising processes need not import torch; tests read the result with it.
Memory does not grow with the data: lengths go to a file of their own until the index is put together from it.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from ouro_megatron.data.indexed import HEADER, INDEX_MAGIC, INDEX_VERSION, Index, read_index, with_suffix

LOSS_SUFFIX = ".loss.bin"
"""uint8 0/1 for each token of .bin: whether it counts as a label. Absent: all count."""
MAX_LENGTH = 2**31 - 1
"""Tokens of one document that an index can hold (int32)."""
_PIECE = 1 << 22
"""Bytes (or entries) handled at one time."""


def token_dtype(vocab: int) -> np.dtype:
    """uint16 up to 65,536 ids, else int32."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<i4")


class PairWriter:
    """Appends documents of one sequence each; `close` completes the pair. Until then only `.part` files exist.

    `count_vocab`: also counts how often each id occurs, into `counts` (int64[count_vocab]), and hashes the files.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, *, count_vocab: int | None = None) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.tokens = 0
        self.documents = 0
        self.counts = None if count_vocab is None else np.zeros(count_vocab, dtype=np.int64)
        self.hashes: dict[str, str] = {}
        """SHA-256 of each file by its suffix, once closed; only with `count_vocab`."""
        self._masked = False
        """A token that does not count was written."""
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._open(".bin.part")
        self._lengths = self._open(".lengths.part")
        self._loss: BinaryIO | None = None
        self._sha = {".bin": hashlib.sha256(), LOSS_SUFFIX: hashlib.sha256()}

    def add(self, ids: Sequence[int]) -> None:
        """One document of one sequence."""
        self.add_many(np.asarray(ids), np.asarray([len(ids)], dtype=np.int64))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray, loss: np.ndarray | None = None) -> None:
        """Several documents of one sequence each: `ids` holds them one after the other, `lengths` the tokens of each.

        `loss` (bool, one for each id) says which count as labels; None: all. Raises ValueError when the lengths do not
        add up to the ids, or one is beyond int32.
        """
        if int(lengths.sum()) != len(ids) or (loss is not None and len(loss) != len(ids)):
            raise ValueError(f"{len(ids)} ids, but lengths add up to {int(lengths.sum())}")
        if len(lengths) and int(lengths.max()) > MAX_LENGTH:
            raise ValueError(f"a document of {int(lengths.max())} tokens; an index holds {MAX_LENGTH} at most")
        self._write_tokens(np.ascontiguousarray(ids, dtype=self.dtype))
        if loss is not None and not loss.all():
            self._begin_loss(self.tokens)
        if self._loss is not None:
            self._write_loss(np.ones(len(ids), np.uint8) if loss is None else loss.astype(np.uint8))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def add_long(self, write: Callable[[Callable[[np.ndarray], None]], object]) -> int | None:
        """One document that is never held: `write` gets a function that takes its next ids, and calls it until the end.

        Returns its number of ids; None when they are more than an index holds, and then nothing of it stays, as when
        `write` raises.
        """
        begin = self.tokens

        def put(ids: np.ndarray) -> None:
            self._write_tokens(np.ascontiguousarray(ids, dtype=self.dtype))
            if self._loss is not None:
                self._write_ones(len(ids))
            self.tokens += len(ids)

        try:
            write(put)
        except BaseException:
            self._cut_back(begin)
            raise
        length = self.tokens - begin
        if length > MAX_LENGTH:
            self._cut_back(begin)
            return None
        self._lengths.write(np.array([length], dtype="<i4").tobytes())
        self.documents += 1
        return length

    def _cut_back(self, tokens: int) -> None:
        """Only without hashes and counts, which cannot be taken back."""
        assert self.counts is None
        self._bin.truncate(tokens * self.dtype.itemsize)
        self._bin.seek(0, os.SEEK_END)
        if self._loss is not None:
            self._loss.truncate(tokens)
            self._loss.seek(0, os.SEEK_END)
        self.tokens = tokens

    def append(self, other: Path, first: int = 0, stop: int | None = None, dropped: np.ndarray | None = None) -> None:
        """Documents [first, stop) of another pair that this class wrote, without those whose numbers are in `dropped`.

        Raises ValueError when it is of another dtype.
        """
        index = read_index(other)
        if index.dtype != self.dtype:
            raise ValueError(f"{other} holds {index.dtype}, {self.prefix} {self.dtype}")
        loss = with_suffix(other, LOSS_SUFFIX)
        if loss.exists():
            self._begin_loss(self.tokens)
        stop = len(index.lengths) if stop is None else stop
        with with_suffix(other, ".bin").open("rb") as tokens:
            for begin, end in _runs(first, stop, dropped):
                start, length = _span(index, begin, end)
                for piece in _pieces(tokens, start * self.dtype.itemsize, length * self.dtype.itemsize):
                    self._write_tokens(np.frombuffer(piece, dtype=self.dtype))
                self._append_loss(loss if loss.exists() else None, start, length)
                self._lengths.write(np.asarray(index.lengths[begin:end]).tobytes())
                self.documents += end - begin
                self.tokens += length

    def _append_loss(self, path: Path | None, start: int, length: int) -> None:
        if self._loss is None:
            return
        if path is None:
            self._write_ones(length)
            return
        with path.open("rb") as file:
            for piece in _pieces(file, start, length):
                self._write_loss(np.frombuffer(piece, dtype=np.uint8))

    def _write_tokens(self, ids: np.ndarray) -> None:
        data = ids.data if ids.size else b""
        self._bin.write(data)
        if self.counts is not None:
            self._sha[".bin"].update(data)
            if ids.size:
                found = np.bincount(ids, minlength=len(self.counts))
                if len(found) > len(self.counts):
                    raise ValueError(f"{self.prefix}: id {len(found) - 1}, the tokenizer has {len(self.counts)}")
                self.counts += found

    def _begin_loss(self, tokens: int) -> None:
        """From the first masked document on there is a mask; it says that all before it counted."""
        if self._loss is None:
            self._loss = self._open(f"{LOSS_SUFFIX}.part")
            self._write_ones(tokens)

    def _write_ones(self, count: int) -> None:
        for start in range(0, count, _PIECE):
            self._write_loss(np.ones(min(_PIECE, count - start), dtype=np.uint8))

    def _write_loss(self, mask: np.ndarray) -> None:
        assert self._loss is not None
        if not mask.size:
            return
        self._masked = self._masked or not mask.all()
        self._loss.write(mask.data)
        self._sha[LOSS_SUFFIX].update(mask.data)

    def close(self) -> None:
        """Flushes all files to disk and gives them their names, the index last. A mask of ones only is left out."""
        for file in (self._bin, self._lengths, self._loss):
            if file is not None:
                self._sync(file)
                file.close()
        self._write_index()
        self._path(".lengths.part").unlink()
        suffixes = [".bin", ".idx"]
        if self._loss is not None and self._masked:
            suffixes.insert(1, LOSS_SUFFIX)
        else:
            self._path(f"{LOSS_SUFFIX}.part").unlink(missing_ok=True)
            self._path(LOSS_SUFFIX).unlink(missing_ok=True)
        for suffix in suffixes:
            self._path(f"{suffix}.part").replace(self._path(suffix))
            if self.counts is not None:
                self.hashes[suffix] = self._sha[suffix].hexdigest()

    def _write_index(self) -> None:
        count = self.documents
        digest = self._sha[".idx"] = hashlib.sha256()
        with self._path(".idx.part").open("wb") as file:

            def put(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            code = 8 if self.dtype.itemsize == 2 else 4
            put(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, count, count + 1))
            for lengths in self._written_lengths():
                put(lengths.tobytes())
            end = 0
            for lengths in self._written_lengths():
                ends = end + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                put(np.concatenate(([end], ends[:-1])).astype("<i8").tobytes())
                end = int(ends[-1])
            for start in range(0, count + 1, _PIECE):
                put(np.arange(start, min(start + _PIECE, count + 1), dtype="<i8").tobytes())
            self._sync(file)

    def _written_lengths(self) -> Iterator[np.ndarray]:
        with self._path(".lengths.part").open("rb") as file:
            while piece := file.read(4 * (_PIECE // 4)):
                yield np.frombuffer(piece, dtype="<i4")

    def discard(self) -> None:
        """Removes what was written."""
        for file in (self._bin, self._lengths, self._loss):
            if file is not None:
                file.close()
        for suffix in (".bin.part", ".lengths.part", f"{LOSS_SUFFIX}.part", ".idx.part"):
            self._path(suffix).unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return with_suffix(self.prefix, suffix)

    def _open(self, suffix: str) -> BinaryIO:
        return self._path(suffix).open("wb")

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()


def _runs(first: int, stop: int, dropped: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Half-open runs of documents of [first, stop) without the dropped ones (sorted numbers)."""
    begin = first
    for number in () if dropped is None else dropped[(dropped >= first) & (dropped < stop)].tolist():
        if number > begin:
            yield begin, number
        begin = number + 1
    if stop > begin:
        yield begin, stop


def _span(index: Index, begin: int, end: int) -> tuple[int, int]:
    """(first token, number of tokens) of sequences [begin, end)."""
    itemsize = index.dtype.itemsize
    start = int(index.offsets[begin])
    return start // itemsize, (int(index.offsets[end - 1]) - start) // itemsize + int(index.lengths[end - 1])


def _pieces(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    file.seek(start)
    while length > 0:
        piece = file.read(min(_PIECE, length))
        if not piece:
            raise ValueError(f"{file.name}: ends {length} bytes early")
        length -= len(piece)
        yield piece
