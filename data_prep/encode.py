"""Many texts to token ids at one time, as flat arrays."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.long_text import LongText
from data_prep.memory import DOCUMENT_MEMORY, UNCUT, check_size
from data_prep.safe_cuts import can_be_cut, parts
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer


class Encoded(NamedTuple):
    """Token ids of several texts, one after the other."""

    ids: np.ndarray
    """uint32[sum of lengths]"""
    lengths: np.ndarray
    """int64[texts], ids of each text"""

    def ended_by(self, token: int) -> "Encoded":
        """The same with `token` after each text."""
        lengths = self.lengths + 1
        ids = np.full(len(self.ids) + len(lengths), token, dtype=self.ids.dtype)
        ends = np.cumsum(lengths) - 1
        inside = np.ones(len(ids), dtype=bool)
        inside[ends] = False
        ids[inside] = self.ids
        return Encoded(ids, lengths)

    def only(self, chosen: np.ndarray) -> "Encoded":
        """The texts whose entry in `chosen` (bool[texts]) is true."""
        return Encoded(self.ids[np.repeat(chosen, self.lengths)], self.lengths[chosen])


class BatchEncoder(Protocol):
    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of each text, nothing added. Text that merely spells a special token stays text."""

    def encode_long(self, text: LongText, put: Callable[[np.ndarray], object], memory: int = DOCUMENT_MEMORY) -> None:
        """The same of one text that is not held in memory; `put` gets its ids (uint32) in order, piece by piece.

        Raises TooLargeError, after some pieces perhaps, when it must be held and takes more than `memory` bytes.
        """


class PlainEncoder:
    """`encode_batch_fast` of `tokenizers`: every tokenizer, and the reference for every other encoder."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _can_be_cut(self) -> bool:
        return can_be_cut(self._tokenizer.to_json())

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        rows = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint32, count=int(lengths.sum()))
        return Encoded(ids, lengths)

    def encode_long(self, text: LongText, put: Callable[[np.ndarray], object], memory: int = DOCUMENT_MEMORY) -> None:
        """Holds the text where it is not known how the tokenizer may be cut without changing ids."""
        if self._can_be_cut:
            for part in parts(text.pieces(), memory):
                put(self.encode_batch([part]).ids)
            return
        check_size("a text that this tokenizer takes as a whole", text.size, UNCUT, memory)
        put(self.encode_batch([text.whole()]).ids)


def same_ids(one: Encoded, other: Encoded) -> bool:
    """Whether both hold the same ids for each text."""
    return np.array_equal(one.lengths, other.lengths) and np.array_equal(one.ids, other.ids)


def batch_encoder(tokenizer_folder: Path) -> BatchEncoder:
    """The fastest encoder that gives exactly the ids of `tokenizers` for this folder's tokenizer.

    Raises DataError as `load_tokenizer` does.
    """
    return choose_encoder(load_tokenizer(tokenizer_folder))[0]


def choose_encoder(tokenizer: TextTokenizer) -> tuple[BatchEncoder, str | None]:
    """`batch_encoder`, and why it is the slow one, if it is."""
    from data_prep.byte_level import ByteLevelEncoder, MisfitError

    try:
        return ByteLevelEncoder(tokenizer), None
    except MisfitError as misfit:
        return PlainEncoder(tokenizer), str(misfit)


def open_tokenizer(folder: Path) -> tuple[TextTokenizer, BatchEncoder]:
    """A tokenizer and its encoder, kept for the next call of this process while its files stay as they are.

    A worker asks once a shard; making them takes as long as encoding tens of megabytes. Raises DataError as
    `load_tokenizer` does.
    """
    return _opened(folder)[:2]


def why_slow(folder: Path) -> str | None:
    """Why `open_tokenizer` gives the encoder that is slow; None when it does not."""
    return _opened(folder)[2]


def _opened(folder: Path) -> tuple[TextTokenizer, BatchEncoder, str | None]:
    inside = folder if folder.is_dir() else folder.parent  # the path may be that of tokenizer.json
    files = (file.stat() for file in sorted(inside.glob("*.json")))
    return _open(folder, tuple((status.st_size, status.st_mtime_ns) for status in files))


@lru_cache(maxsize=1)
def _open(folder: Path, stamp: tuple[tuple[int, int], ...]) -> tuple[TextTokenizer, BatchEncoder, str | None]:
    tokenizer = load_tokenizer(folder)
    return tokenizer, *choose_encoder(tokenizer)
