"""Looks at prepared data: is it whole, what is in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.merge import entropy_of
from ouro_megatron.data.indexed import check_prefix, read_index, read_manifest, sha256_of, with_suffix
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError

_ANY_VOCAB = 2**31


def verify(prefix: Path) -> str:
    """Reads all of a pair and compares it with its index and, where there is one, its manifest's hashes.

    Returns one line; raises DataError naming the file that is wrong.
    """
    info = check_prefix(prefix, _ANY_VOCAB)
    manifest = read_manifest(prefix)
    if manifest is None:
        return f"{prefix}: whole ({info.documents:,} documents, {info.tokens:,} tokens); no manifest to compare with"
    for suffix in (".bin", ".idx"):
        file = with_suffix(prefix, suffix)
        if sha256_of(file) != manifest[suffix[1:]]["sha256"]:
            raise DataError(f"{file}: its content is not what its manifest says; prepare it again")
    return f"{prefix}: whole, equals its manifest ({info.documents:,} documents, {info.tokens:,} tokens)"


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


@dataclass(frozen=True)
class Stats:
    documents: int
    tokens: int
    shortest: int
    median: int
    longest: int
    unigram_entropy: float
    """nats a token"""
    used_ids: int


def stats(prefix: Path) -> Stats:
    """Reads all tokens once. Raises DataError as `check_prefix` does."""
    info = check_prefix(prefix, _ANY_VOCAB)
    index = read_index(prefix)
    counts = token_counts(prefix, index.dtype, info.vocab or int(np.iinfo(np.uint16).max) + 1)
    lengths = np.asarray(index.lengths)
    return Stats(
        documents=info.documents,
        tokens=info.tokens,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        unigram_entropy=entropy_of(counts),
        used_ids=int((counts > 0).sum()),
    )


def documents(prefix: Path, first: int, count: int, tokenizer: Path | None) -> Iterator[tuple[int, list[int], str]]:
    """(number, ids, text) of documents `first` to `first + count`; the manifest names the tokenizer when None."""
    check_prefix(prefix, _ANY_VOCAB)
    index, manifest = read_index(prefix), read_manifest(prefix)
    if tokenizer is None:
        if manifest is None:
            raise DataError(f"{prefix}: has no manifest that names its tokenizer; give --tokenizer")
        tokenizer = Path(manifest["tokenizer"]["path"])
    decoder = load_tokenizer(tokenizer)
    total = len(index.documents) - 1
    if not 0 <= first < total:
        raise DataError(f"{prefix}: document {first} of {total}; the first is 0")
    tokens = np.memmap(with_suffix(prefix, ".bin"), dtype=index.dtype, mode="r")
    for number in range(first, min(first + count, total)):
        begin, end = int(index.documents[number]), int(index.documents[number + 1])
        start = int(index.offsets[begin]) // index.dtype.itemsize
        stop = int(index.offsets[end - 1]) // index.dtype.itemsize + int(index.lengths[end - 1])
        ids = tokens[start:stop].tolist()
        yield number, ids, decoder.decode(ids)
