"""Reads all of a pair and says whether it is whole."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.plan import FILES
from data_prep.writer import LOSS_SUFFIX
from ouro_megatron.data.indexed import Index, check_prefix, read_index, read_manifest, sha256_of, with_suffix
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError

ANY_VOCAB = 2**31
_PIECE = 1 << 24


def verify(prefix: Path, tokenizer: Path | None = None) -> str:
    """Compares a pair with its index and, where there is one, its manifest's hashes and counts; looks at every id.

    `tokenizer`: ids must be below its vocabulary; the manifest's number when None. Returns one line; raises DataError
    naming the file that is wrong, and the place in it where there is one.
    """
    info = check_prefix(prefix, ANY_VOCAB)
    manifest = read_manifest(prefix)
    index = read_index(prefix)
    _check_index(index)
    vocab = info.vocab if tokenizer is None else load_tokenizer(tokenizer).vocab_size
    highest, hashed = _read_tokens(prefix, index, vocab)
    masked = _check_loss(prefix, info.tokens)
    notes = f"{info.documents:,} documents, {info.tokens:,} tokens, highest id {highest:,}"
    if masked is not None:
        notes += f", {masked:,} tokens count in the loss"
    if manifest is None:
        return f"{prefix}: whole ({notes}); no manifest to compare with"
    _check_manifest(prefix, manifest, info.documents, info.tokens, hashed)
    return f"{prefix}: whole, equals its manifest ({notes})"


def _check_index(index: Index) -> None:
    """Lengths, offsets and document boundaries against each other."""
    end = 0
    for start in range(0, len(index.lengths), _PIECE):
        lengths = np.asarray(index.lengths[start : start + _PIECE]).astype(np.int64)
        if int(lengths.min()) < 0:
            raise DataError(f"{index.path}: sequence {start + int(lengths.argmin())} has a negative length")
        ends = end + np.cumsum(lengths) * index.dtype.itemsize
        expected = np.concatenate(([end], ends[:-1]))
        wrong = np.flatnonzero(np.asarray(index.offsets[start : start + _PIECE]) != expected)
        if len(wrong):
            at = start + int(wrong[0])
            raise DataError(
                f"{index.path}: sequence {at} begins at byte {int(index.offsets[at])}, not where the last ends"
            )
        end = int(ends[-1])
    for start in range(0, len(index.documents) - 1, _PIECE):
        steps = np.diff(np.asarray(index.documents[start : start + _PIECE + 1]))
        if len(steps) and int(steps.min()) < 0:
            raise DataError(f"{index.path}: document {start + int(steps.argmin())} ends before it begins")


def _read_tokens(prefix: Path, index: Index, vocab: int | None) -> tuple[int, str]:
    """(highest id, SHA-256 of the .bin)."""
    path = with_suffix(prefix, ".bin")
    digest = hashlib.sha256()
    highest = at = 0
    for data in _pieces(path):
        digest.update(data)
        ids = np.frombuffer(data, dtype=index.dtype)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocab is not None and high >= vocab):
            wrong = int(np.flatnonzero((ids < 0) | (ids >= (vocab or ANY_VOCAB)))[0])
            document = int(np.searchsorted(index.offsets, (at + wrong) * index.dtype.itemsize, side="right")) - 1
            limit = "ids are not negative" if vocab is None else f"the vocabulary is {vocab:,}"
            raise DataError(
                f"{path}: token {at + wrong:,} (sequence {document:,}) is id {int(ids[wrong]):,}, but {limit}"
            )
        highest = max(highest, high)
        at += len(ids)
    return highest, digest.hexdigest()


def _check_loss(prefix: Path, tokens: int) -> int | None:
    """Tokens that count; None without a mask."""
    path = with_suffix(prefix, LOSS_SUFFIX)
    if not path.exists():
        return None
    if path.stat().st_size != tokens:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes for {tokens:,} tokens; copy or prepare it again")
    counted = at = 0
    for data in _pieces(path):
        mask = np.frombuffer(data, dtype=np.uint8)
        if int(mask.max()) > 1:
            raise DataError(f"{path}: byte {at + int(mask.argmax()):,} is {int(mask.max())}, neither 0 nor 1")
        counted += int(mask.sum(dtype=np.int64))
        at += len(mask)
    return counted


def _check_manifest(prefix: Path, manifest: dict[str, Any], documents: int, tokens: int, bin_hash: str) -> None:
    for name, found in (("documents", documents), ("tokens", tokens)):
        if manifest.get(name) != found:
            raise DataError(f"{prefix}: {found:,} {name}, its manifest says {manifest.get(name)}")
    for suffix, name in FILES.items():
        file = with_suffix(prefix, suffix)
        if name not in manifest:
            if file.exists():
                raise DataError(f"{file}: its manifest knows nothing of it; it belongs to another pair")
            continue
        if not file.exists():
            raise DataError(f"{file}: missing, its manifest names it; copy or prepare it again")
        if (bin_hash if suffix == ".bin" else sha256_of(file)) != manifest[name]["sha256"]:
            raise DataError(f"{file}: its content is not what its manifest says; prepare it again")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
