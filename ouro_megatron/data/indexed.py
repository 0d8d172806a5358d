"""Megatron's indexed datasets on disk: what a prefix holds, and a cheap check that it is whole.

A dataset is a pair of files beside each other. `PREFIX.bin` holds token ids and nothing else. `PREFIX.idx`, little
endian: 9 bytes `MMIDIDX\\0\\0` | u64 version = 1 | u8 dtype code | u64 sequences S | u64 boundaries D + 1 |
int32 lengths[S] | int64 byte offsets[S] | int64 document boundaries[D + 1], from 0 to S
(megatron.core.datasets.indexed_dataset).
Megatron's reader never compares the two files, so a short .bin is found here or not at all.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ouro_megatron.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Codes of the integer types; 6 and 7 are floats and never hold token ids."""


MAX_BLEND = 32_766
"""Pairs in a blend: Megatron numbers them in int16, and asks for fewer than 32,767."""
MAX_SEQUENCES = 2**31 - 1
"""Sequences of a pair: Megatron's document index is int32."""


def with_suffix(prefix: Path, suffix: str) -> Path:
    """`prefix` plus `suffix`; unlike Path.with_suffix it keeps dots of the name ("web.v1" -> "web.v1.bin")."""
    return prefix.parent / (prefix.name + suffix)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


@dataclass(frozen=True)
class Index:
    """An .idx file, memory-mapped. Shapes: lengths int32[S], offsets int64[S] (bytes), documents int64[D + 1]."""

    path: Path
    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    @property
    def bin_bytes(self) -> int:
        """Size that the .bin must have: where the last sequence ends."""
        if len(self.lengths) == 0:
            return 0
        return int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize


@dataclass(frozen=True)
class PrefixInfo:
    """What a dataset holds, without having read its tokens."""

    prefix: Path
    dtype: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    vocab: int | None
    """Vocabulary of the tokenizer that made it; None without a manifest."""


def read_index(prefix: Path) -> Index:
    """Maps PREFIX.idx. Raises DataError when it is missing, not an index, or of another size than its header says."""
    path = with_suffix(prefix, ".idx")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
    except OSError as error:
        named = prefix.suffix in (".bin", ".idx")
        hint = (
            f"Name the pair without a suffix: {prefix.with_suffix('')}"
            if named
            else "Prepare it with `ouro data prepare`"
        )
        raise DataError(f"{path}: cannot be read ({error.strerror}). {hint}.") from error
    if len(header) < HEADER.size or not header.startswith(INDEX_MAGIC):
        raise DataError(f"{path}: not an index of an indexed dataset (bad header). Prepare the data again.")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != INDEX_VERSION:
        raise DataError(f"{path}: index version {version}, only {INDEX_VERSION} is known.")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code} is not an integer type that holds token ids.")
    if boundaries < 1:
        raise DataError(f"{path}: no document boundaries. Prepare the data again.")
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, but its header ({sequences} sequences, {boundaries - 1} documents) asks for "
            f"{expected}. It was cut short or overwritten: copy or prepare it again."
        )
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    # Plain views of the mapping; the offsets of the header make them unaligned, which numpy handles.
    at_offsets = HEADER.size + 4 * sequences
    at_documents = at_offsets + 8 * sequences
    return Index(
        path=path,
        dtype=np.dtype(DTYPES[code]),
        lengths=np.frombuffer(raw, np.dtype("<i4"), sequences, HEADER.size),
        offsets=np.frombuffer(raw, np.dtype("<i8"), sequences, at_offsets),
        documents=np.frombuffer(raw, np.dtype("<i8"), boundaries, at_documents),
    )


def pairs_of(path: Path) -> list[Path]:
    """`path` itself, or the pairs PATH-00000-of-NNNNN that data preparation makes of a large source, in their order.

    Raises DataError when some of those pairs are missing.
    """
    if with_suffix(path, ".idx").exists():
        return [path]
    pattern = re.compile(re.escape(path.name) + r"-(\d{5})-of-(\d{5})\.idx")
    names = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    if not matches:
        return [path]
    count = int(matches[0][2])
    if [(int(match[1]), int(match[2])) for match in matches] != [(number, count) for number in range(count)]:
        raise DataError(
            f"{path}: {len(matches)} of the {count} pairs {path.name}-00000-of-{count:05d} and so on are there, or "
            "they are of several runs: prepare or copy all of one run"
        )
    return [path.with_name(match.string.removesuffix(".idx")) for match in matches]


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """PREFIX.manifest.json as data preparation wrote it, or None. Raises DataError when it is there but unreadable."""
    path = with_suffix(prefix, ".manifest.json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Prepare the data again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a manifest. Prepare the data again.")
    return content


def check_prefix(prefix: Path, vocab: int) -> PrefixInfo:
    """Cheap check before training: both files there, sizes that agree, and a vocabulary the model can hold.

    Reads the index header and its last entries only, so terabytes cost nothing. `vocab`: rows of the model's embedding.
    Raises DataError naming the file and the fix.
    """
    index = read_index(prefix)
    bin_path = with_suffix(prefix, ".bin")
    try:
        bin_bytes = bin_path.stat().st_size
    except OSError as error:
        raise DataError(f"{bin_path}: cannot be read ({error.strerror}). Its .idx is there: copy it again.") from error
    if len(index.lengths) == 0:
        raise DataError(f"{index.path}: holds no sequences. Check the source it was prepared from.")
    if int(index.documents[0]) != 0 or int(index.documents[-1]) != len(index.lengths):
        raise DataError(
            f"{index.path}: document boundaries run from {int(index.documents[0])} to {int(index.documents[-1])}, "
            f"expected 0 to {len(index.lengths)}. Prepare the data again."
        )
    if bin_bytes != index.bin_bytes:
        word = "short" if bin_bytes < index.bin_bytes else "long"
        raise DataError(
            f"{bin_path}: too {word}: {bin_bytes} bytes, its .idx says {index.bin_bytes}. "
            "It was cut or belongs to another .idx: copy both files again, or prepare them again."
        )
    manifest = read_manifest(prefix)
    made_with = None if manifest is None else int(manifest["tokenizer"]["vocab"])
    if made_with is not None and made_with > vocab:
        raise DataError(
            f"{prefix}: tokenised with a vocabulary of {made_with}, the model has {vocab}. "
            f"Set model.vocab to {made_with} or more, or prepare the data with another tokenizer."
        )
    return PrefixInfo(
        prefix=prefix,
        dtype=index.dtype.name,
        sequences=len(index.lengths),
        documents=len(index.documents) - 1,
        tokens=bin_bytes // index.dtype.itemsize,
        bin_bytes=bin_bytes,
        idx_bytes=index.path.stat().st_size,
        vocab=made_with,
    )
