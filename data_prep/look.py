"""Shows what is in a pair: counts, lengths, documents as text with what counts in the loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.merge import entropy_of
from data_prep.verify import ANY_VOCAB
from data_prep.writer import LOSS_SUFFIX
from ouro_megatron.data.indexed import Index, check_prefix, read_index, read_manifest, with_suffix
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.errors import DataError

_PIECE = 1 << 24
_BINS_PER_DOUBLING = 2


@dataclass(frozen=True)
class Stats:
    prefix: Path
    documents: int
    tokens: int
    shortest: int
    median: int
    longest: int
    unigram_entropy: float
    """nats a token"""
    used_ids: int
    counted: int
    """Tokens that count in the loss."""
    lengths: np.ndarray
    """int64[documents], tokens of each."""


def stats(prefix: Path) -> Stats:
    """Reads all tokens once. Raises DataError as `check_prefix` does."""
    info = check_prefix(prefix, ANY_VOCAB)
    index = read_index(prefix)
    counts = token_counts(prefix, index.dtype)
    lengths = document_lengths(index)
    loss = with_suffix(prefix, LOSS_SUFFIX)
    counted = int(np.memmap(loss, dtype=np.uint8, mode="r").sum(dtype=np.int64)) if loss.exists() else info.tokens
    return Stats(
        prefix=prefix,
        documents=info.documents,
        tokens=info.tokens,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
        unigram_entropy=entropy_of(counts),
        used_ids=int((counts > 0).sum()),
        counted=counted,
        lengths=lengths,
    )


def document_lengths(index: Index) -> np.ndarray:
    """Tokens of each document, int64[D]; a document may have several sequences, or none."""
    ends = np.concatenate(([0], np.cumsum(index.lengths, dtype=np.int64)))
    return np.diff(ends[np.asarray(index.documents)])


def token_counts(prefix: Path, dtype: np.dtype) -> np.ndarray:
    """How often each id occurs in a pair's .bin, int64[highest id + 1]; reads it in pieces."""
    counts = np.zeros(0, dtype=np.int64)
    with with_suffix(prefix, ".bin").open("rb") as file:
        while piece := file.read(_PIECE):
            found = np.bincount(np.frombuffer(piece, dtype=dtype), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    return counts


def save_histogram(found: Sequence[Stats], path: Path) -> None:
    """Share of documents and of tokens by document length, one pair of panels a source, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    top = max(max(item.longest for item in found), 2)
    edges = 2.0 ** (np.arange(0, _BINS_PER_DOUBLING * (np.ceil(np.log2(top)) + 1) + 1) / _BINS_PER_DOUBLING)
    axes = figure.subplots(len(found), 2, squeeze=False, sharex=True)
    for row, item in zip(axes, found, strict=True):
        lengths = np.maximum(item.lengths, 1)
        for axis, weights, what in ((row[0], None, "documents"), (row[1], lengths / max(lengths.sum(), 1), "tokens")):
            shares = np.full(len(lengths), 1 / len(lengths)) if weights is None else weights
            axis.hist(lengths, bins=edges, weights=100 * shares, color="#4c72b0")
            axis.set_xscale("log", base=2)
            axis.set_ylabel(f"% of {what}")
            axis.axvline(item.median, color="#c44e52", linewidth=1)
        row[0].set_title(
            f"{item.prefix.name}: {item.documents:,} documents, median {item.median:,}", fontsize=9, loc="left"
        )
        row[1].set_title(f"{item.tokens:,} tokens, longest {item.longest:,}", fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("tokens of a document")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Run:
    """Ids next to each other that all count in the loss or all do not, as text."""

    text: str
    counts: bool
    special: bool
    """One special token."""


@dataclass(frozen=True)
class ShownDocument:
    number: int
    ids: list[int]
    text: str
    loss: list[bool] | None
    """For each id; None when all count."""
    runs: tuple[Run, ...]


def documents(prefix: Path, first: int, count: int, tokenizer: Path | None) -> Iterator[ShownDocument]:
    """Documents `first` to `first + count`; the manifest names the tokenizer when None."""
    check_prefix(prefix, ANY_VOCAB)
    index, manifest = read_index(prefix), read_manifest(prefix)
    if tokenizer is None:
        if manifest is None:
            raise DataError(f"{prefix}: has no manifest that names its tokenizer; give --tokenizer")
        tokenizer = Path(manifest["tokenizer"]["path"])
    decoder = load_tokenizer(tokenizer)
    if manifest is not None and manifest["tokenizer"]["sha256"] != decoder.sha256:
        raise DataError(f"{prefix}: {tokenizer} is not the tokenizer it was made with; its text would be wrong")
    total = len(index.documents) - 1
    if not 0 <= first < total:
        raise DataError(f"{prefix}: document {first} of {total}; the first is 0")
    tokens = np.memmap(with_suffix(prefix, ".bin"), dtype=index.dtype, mode="r")
    loss_file = with_suffix(prefix, LOSS_SUFFIX)
    mask = np.memmap(loss_file, dtype=np.uint8, mode="r") if loss_file.exists() else None
    for number in range(first, min(first + count, total)):
        start, stop = _span(index, number)
        ids = tokens[start:stop].tolist()
        loss = None if mask is None else (mask[start:stop] > 0).tolist()
        yield ShownDocument(number, ids, decoder.decode(ids), loss, tuple(_runs(decoder, ids, loss)))


def _span(index: Index, number: int) -> tuple[int, int]:
    """[first, stop) token of a document, which may have no sequence at all."""
    begin, end = int(index.documents[number]), int(index.documents[number + 1])
    if begin == end:
        return 0, 0
    itemsize = index.dtype.itemsize
    return int(index.offsets[begin]) // itemsize, int(index.offsets[end - 1]) // itemsize + int(index.lengths[end - 1])


def _runs(decoder: TextTokenizer, ids: list[int], loss: list[bool] | None) -> Iterator[Run]:
    begin = 0
    counts = [True] * len(ids) if loss is None else loss
    special = [token in decoder.special_ids for token in ids]
    for at in range(1, len(ids) + 1):
        if at == len(ids) or counts[at] != counts[begin] or special[at] or special[begin]:
            yield Run(decoder.decode(ids[begin:at]), counts[begin], special[begin])
            begin = at
