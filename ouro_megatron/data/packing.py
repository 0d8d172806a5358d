"""Packing documents into sequences of one length: which documents lie together. Arithmetic on lengths, no tokens.

A document of n tokens is n - 1 predictions: it takes n - 1 slots of a sequence, each an input token with the one that
follows as its label. A sequence of s slots thus holds a document of s + 1 tokens whole.

Documents are planned in blocks of `BLOCK` in the order of the index, so memory does not grow with the data; a sequence
never holds documents of two blocks, which costs at most one unfinished sequence a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ouro_megatron.data.indexed import check_prefix, read_index
from ouro_megatron.errors import DataError

Packing = Literal["in_order", "best_fit"]
LongDocuments = Literal["truncate", "split", "drop"]

BLOCK = 1 << 22
VERSION = 1
"""Changes when the same lengths would be packed otherwise: plans and runs of another version do not go on."""


@dataclass
class PackingReport:
    """What became of the documents; adds up over blocks."""

    documents: int = 0
    tokens: int = 0
    too_short: int = 0
    """Documents of fewer than two tokens: nothing to predict; left out."""
    too_long: int = 0
    """Documents of more tokens than a sequence and one."""
    dropped_tokens: int = 0
    """Tokens of left-out documents and of the ends that were truncated."""
    pieces: int = 0
    """Documents and parts of documents that are packed."""
    sequences: int = 0
    slots: int = 0
    used_slots: int = 0

    @property
    def waste(self) -> float:
        """Share of the slots that hold padding."""
        return 1.0 - self.used_slots / self.slots if self.slots else 0.0

    def __add__(self, other: "PackingReport") -> "PackingReport":
        return PackingReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def describe(self, long: LongDocuments | None) -> str:
        """One line for the log."""
        line = (
            f"{self.documents:,} documents in {self.sequences:,} sequences, {self.waste:.2%} padding, "
            f"{self.pieces / max(1, self.sequences):.1f} documents a sequence"
        )
        if self.too_long:
            done = {"truncate": "truncated", "split": "split", "drop": "dropped", None: "too long"}[long]
            line += f"; {self.too_long:,} too long, {done}"
        if self.too_short:
            line += f"; {self.too_short:,} of fewer than two tokens left out"
        if self.dropped_tokens:
            line += f"; {self.dropped_tokens:,} of {self.tokens:,} tokens left out"
        return line


@dataclass(frozen=True)
class PackedBlock:
    """Some sequences and what they hold. Sequence k holds pieces [starts[k], starts[k + 1])."""

    document: np.ndarray
    """int32[p]: number of the document in the index."""
    offset: np.ndarray
    """int32[p]: token of the document that the piece begins with."""
    slots: np.ndarray
    """int32[p]: predictions of the piece; it is made of one token more."""
    starts: np.ndarray
    """int64[k + 1]"""
    report: PackingReport


def pack(
    lengths: np.ndarray, sequence: int, packing: Packing, long: LongDocuments | None, *, block: int = BLOCK
) -> Iterator[PackedBlock]:
    """Packs documents of these lengths (tokens, int32[n]) into sequences of `sequence` slots, block by block.

    `best_fit`: longest first, each into the fullest sequence that has room (best-fit decreasing). `in_order`: one
    after the other, a new sequence when the next does not fit. Documents longer than `sequence` + 1 tokens are
    truncated, split into pieces (each label still predicted once) or dropped. Inside a sequence pieces are in the order
    of the index. The result depends on the arguments alone. Raises DataError when `long` is None and one is too long.
    """
    if long is None and (too_long := int(np.count_nonzero(lengths > sequence + 1))):
        raise DataError(
            f"{too_long:,} of {len(lengths):,} documents are longer than data.sequence_length + 1 = {sequence + 1} "
            f"tokens (the longest has {int(lengths.max()):,}): set data.long_documents to truncate, split or drop"
        )
    for first in range(0, len(lengths), block):
        part = np.asarray(lengths[first : first + block])
        document, offset, slots, report = _cut(part, sequence, long)
        pack_of, count = (_best_fit if packing == "best_fit" else _in_order)(slots, sequence)
        order = np.argsort(pack_of, kind="stable")
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(pack_of, minlength=count), out=starts[1:])
        report.pieces, report.sequences = len(slots), count
        report.slots, report.used_slots = count * sequence, int(slots.sum(dtype=np.int64))
        document = (document[order] + first).astype(np.int32)
        yield PackedBlock(document, offset[order], slots[order], starts, report)


def length_histogram(lengths: np.ndarray, *, block: int = BLOCK) -> list[tuple[int, int, int, int]]:
    """Documents by length in powers of two: (shortest, longest, documents, tokens) of each bin that is not empty."""
    documents, tokens = np.zeros(33, np.int64), np.zeros(33, np.int64)
    for first in range(0, len(lengths), block):
        part = np.asarray(lengths[first : first + block], np.int64)
        # frexp's exponent is the number of binary digits: 0 for 0, 1 for 1, 2 for 2 and 3, and so on.
        digits = np.frexp(part)[1]
        documents += np.bincount(digits, minlength=33)
        tokens += np.bincount(digits, weights=part, minlength=33).astype(np.int64)
    return [((1 << k) >> 1, (1 << k) - 1, int(documents[k]), int(tokens[k])) for k in range(33) if documents[k]]


def packing_report(lengths: np.ndarray, sequence: int, packing: Packing, long: LongDocuments | None) -> PackingReport:
    """What `pack` would do, without keeping the plan. Raises DataError as `pack` does."""
    total = PackingReport()
    for part in pack(lengths, sequence, packing, long):
        total += part.report
    return total


def _cut(
    lengths: np.ndarray, sequence: int, long: LongDocuments | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, PackingReport]:
    """Pieces of a block, in order: (document, offset, slots), all int32[p], and the counts of what was left out."""
    is_long = lengths > sequence + 1
    is_short = lengths < 2
    dropped = int(lengths[is_short].sum(dtype=np.int64))
    keep = ~is_short
    document = np.arange(len(lengths), dtype=np.int32)
    predictions = lengths.astype(np.int64) - 1
    if long == "drop":
        keep &= ~is_long
        dropped += int(lengths[is_long].sum(dtype=np.int64))
    if long == "truncate":
        dropped += int((lengths[is_long].astype(np.int64) - sequence - 1).sum())
        predictions = np.minimum(predictions, sequence)
    document, predictions = document[keep], predictions[keep]
    pieces = -(-predictions // sequence)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = (np.arange(int(pieces.sum())) - first_piece) * sequence
    slots = np.minimum(np.repeat(predictions, pieces) - offset, sequence)
    report = PackingReport(
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        too_short=int(is_short.sum()),
        too_long=int(is_long.sum()),
        dropped_tokens=dropped,
    )
    return np.repeat(document, pieces), offset.astype(np.int32), slots.astype(np.int32), report


def _in_order(slots: np.ndarray, sequence: int) -> tuple[np.ndarray, int]:
    ends = np.cumsum(slots, dtype=np.int64)
    starts = []
    at = 0
    while at < len(slots):
        starts.append(at)
        begin = int(ends[at]) - int(slots[at])
        at = int(np.searchsorted(ends, begin + sequence, side="right"))
    bounds = np.asarray([*starts, len(slots)], np.int64)
    sizes: np.ndarray = bounds[1:] - bounds[:-1]
    return np.repeat(np.arange(len(starts), dtype=np.int32), sizes), len(starts)


class _Room:
    """Sequences by the slots they have left, with the smallest that still fits found in one step."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[np.ndarray]] = {}
        self._bits = 0
        """Bit r is set when a sequence has r slots left."""

    def put(self, room: int, sequences: np.ndarray) -> None:
        if room and len(sequences):
            self._by_room.setdefault(room, []).append(sequences)
            self._bits |= 1 << room

    def take(self, size: int) -> tuple[int, np.ndarray] | None:
        """The smallest room of at least `size`, and all sequences that have it."""
        fitting = self._bits >> size
        if not fitting:
            return None
        room = size + (fitting & -fitting).bit_length() - 1
        self._bits ^= 1 << room
        return room, np.concatenate(self._by_room.pop(room))


def _best_fit(slots: np.ndarray, sequence: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing, all pieces of one size at a time.

    Once a piece has gone into the fullest sequence that has room for it, that sequence is the fullest for the next
    piece of the same size too, as long as it has room: so each takes as many as fit. The work grows with the
    number of different sizes, not of pieces.
    """
    order = np.argsort(-slots, kind="stable")
    counts = np.bincount(slots, minlength=sequence + 1)
    placed = np.empty(len(slots), np.int32)
    at = count = 0
    room_left = _Room()
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            found = room_left.take(size)
            if found is None:
                new = -(-left // (sequence // size))
                found = sequence, np.arange(count, count + new, dtype=np.int32)
                count += new
            room, sequences = found
            each = room // size
            full = min(len(sequences), left // each)
            placed[at : at + full * each] = np.repeat(sequences[:full], each)
            at, left = at + full * each, left - full * each
            room_left.put(room - each * size, sequences[:full])
            if left and full < len(sequences):  # fewer than `each` are left: they go together
                placed[at : at + left] = sequences[full]
                room_left.put(room - left * size, sequences[full : full + 1])
                at, left, full = at + left, 0, full + 1
            room_left.put(room, sequences[full:])
    pack_of = np.empty(len(slots), np.int32)
    pack_of[order] = placed
    return pack_of, count


def pack_report(
    prefix: Path, sequence: int, long: LongDocuments
) -> tuple[dict[Packing, PackingReport], list[tuple[int, int, int, int]]]:
    """For `ouro data pack-report`: both ways of packing the pair at `prefix`, and its `length_histogram`.

    Raises DataError when the pair is missing or damaged.
    """
    check_prefix(prefix, 2**31)
    lengths = read_index(prefix).lengths
    ways: tuple[Packing, ...] = ("best_fit", "in_order")
    return {way: packing_report(lengths, sequence, way, long) for way in ways}, length_histogram(lengths)


def report_as_json(report: PackingReport) -> dict[str, Any]:
    return {f.name: getattr(report, f.name) for f in fields(report)}
