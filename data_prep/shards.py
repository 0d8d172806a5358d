"""One shard of a source: the unit of parallel work and of resuming. Runs in processes of its own."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode import batch_encoder
from data_prep.sources.base import Document, Fault, Unit
from data_prep.sources.registry import AnySource
from data_prep.writer import PairWriter, token_dtype
from ouro_megatron.data.indexed import with_suffix
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError

_BATCH = 64
"""Documents tokenised at one time."""


@dataclass(frozen=True)
class ShardTask:
    """Units of one source to tokenise into PARTS/train and PARTS/validation; picklable."""

    source: AnySource
    units: tuple[Unit, ...]
    parts: Path
    tokenizer: Path
    validation_fraction: float

    @property
    def is_done(self) -> bool:
        return (self.parts / "done").is_file()

    def prefix(self, split: str) -> Path:
        return self.parts / split


def is_held_out(key: str, fraction: float) -> bool:
    """Decided by the key alone: the same on every machine, in every order, and for every source that shares keys."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return number < fraction * 2**64


def group_units(units: Sequence[Unit], shard_bytes: int) -> list[tuple[Unit, ...]]:
    """Consecutive units of about `shard_bytes` together; a larger one stands alone."""
    groups: list[tuple[Unit, ...]] = []
    current: list[Unit] = []
    size = 0
    for unit in units:
        if current and size + unit.size > shard_bytes:
            groups.append(tuple(current))
            current, size = [], 0
        current.append(unit)
        size += unit.size
    if current:
        groups.append(tuple(current))
    return groups


def refuse(fault: Fault) -> None:
    """A report that stops at the first fault."""
    raise DataError(f"{fault.path}, {fault.where}: {fault.reason}")


def tokenise_shard(task: ShardTask) -> int:
    """Writes the shard's two pairs, each document followed by the end-of-document id, and a marker at the end.

    Returns the bytes of text. Raises DataError naming the file that cannot be read.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = load_tokenizer(task.tokenizer)
    encoder = batch_encoder(task.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    read = 0
    with (
        PairWriter(task.prefix("train"), dtype) as train,
        PairWriter(task.prefix("validation"), dtype) as validation,
    ):
        for batch in _batches(task):
            encoded = encoder.encode_batch([document.text for document in batch]).ended_by(tokenizer.eod)
            held_out = np.array([is_held_out(document.key, task.validation_fraction) for document in batch])
            train.add_many(*encoded.only(~held_out))
            validation.add_many(*encoded.only(held_out))
            read += sum(len(document.text.encode()) for document in batch)
    (task.parts / "done").write_text(str(read), encoding="utf-8")
    return read


def _batches(task: ShardTask) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for unit in task.units:
        for document in task.source.read(unit, refuse):
            if document.text:
                batch.append(document)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def token_counts(prefix: Path, dtype: np.dtype, vocab: int) -> np.ndarray:
    """How often each id occurs in a pair's .bin, int64[vocab]; reads it in pieces."""
    counts = np.zeros(vocab, dtype=np.int64)
    with with_suffix(prefix, ".bin").open("rb") as file:
        while piece := file.read(1 << 24):
            found = np.bincount(np.frombuffer(piece, dtype=dtype), minlength=vocab)
            if len(found) > vocab:
                raise ValueError(f"{prefix}.bin holds id {len(found) - 1}, the tokenizer has {vocab}")
            counts += found
    return counts


def entropy_of(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts stand for: the loss of the best context-free guess."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log(p)).sum())
