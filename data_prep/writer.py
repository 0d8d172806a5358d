"""Writes Megatron's .bin/.idx pairs; the format is described in ouro_megatron/data/indexed.py.

Without Megatron's own builder, so that tokenising processes need not import torch; tests read the result with it.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from ouro_megatron.data.indexed import HEADER, INDEX_MAGIC, INDEX_VERSION, read_index, with_suffix


def token_dtype(vocab: int) -> np.dtype:
    """uint16 up to 65,536 ids, else int32."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<i4")


class PairWriter:
    """Appends documents; `close` completes the pair. Until then only files named `.part` exist."""

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.tokens = 0
        self.lengths: list[int] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = with_suffix(prefix, ".bin.part").open("wb")

    def add(self, ids: Sequence[int]) -> None:
        """One document of one sequence."""
        array = np.asarray(ids, dtype=self.dtype)
        self._bin.write(array.tobytes())
        self.lengths.append(len(array))
        self.tokens += len(array)

    def add_many(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Several documents of one sequence each: `ids` holds them one after the other, `lengths` the tokens of each.

        Raises ValueError when the lengths do not add up to the ids.
        """
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"{len(ids)} ids, but lengths add up to {int(lengths.sum())}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.lengths.extend(lengths.tolist())
        self.tokens += len(ids)

    def append(self, other: Path) -> None:
        """All documents of another pair of the same dtype."""
        index = read_index(other)
        if index.dtype != self.dtype:
            raise ValueError(f"{other} holds {index.dtype}, {self.prefix} {self.dtype}")
        with with_suffix(other, ".bin").open("rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 20)
        self.lengths.extend(index.lengths.tolist())
        self.tokens += int(index.lengths.sum(dtype=np.int64))

    def close(self) -> None:
        """Flushes both files to disk and gives them their names, the index last."""
        self._sync(self._bin)
        self._bin.close()
        lengths = np.asarray(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        offsets = np.concatenate(([0], ends[:-1])).astype("<i8") if len(lengths) else np.zeros(0, "<i8")
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        code = 8 if self.dtype.itemsize == 2 else 4
        with with_suffix(self.prefix, ".idx.part").open("wb") as file:
            file.write(HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, len(lengths), len(documents)))
            for part in (lengths, offsets, documents):
                file.write(part.tobytes())
            self._sync(file)
        for suffix in (".bin", ".idx"):
            with_suffix(self.prefix, f"{suffix}.part").replace(with_suffix(self.prefix, suffix))

    def discard(self) -> None:
        """Removes what was written."""
        self._bin.close()
        with_suffix(self.prefix, ".bin.part").unlink(missing_ok=True)

    @staticmethod
    def _sync(file: object) -> None:
        file.flush()  # type: ignore[attr-defined]
        os.fsync(file.fileno())  # type: ignore[attr-defined]

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()
