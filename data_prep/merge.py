"""Joins a source's shards to pairs that Megatron can hold, each with a manifest that is written last."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dedup import duplicates_of
from data_prep.plan import FILES, VERSION, SourceJob, base_name, is_whole
from data_prep.pool import Pulse, Work
from data_prep.shards import ShardResult, ShardTask
from data_prep.writer import LOSS_SUFFIX, PairWriter, token_dtype
from ouro_megatron.data.indexed import read_index, read_manifest, with_suffix
from ouro_megatron.errors import DataError


@dataclass(frozen=True)
class Piece:
    """Documents [first, stop) of a shard's pair, without the duplicates among them."""

    task: ShardTask
    first: int
    stop: int
    whole: bool
    """It is all of the shard's pair."""
    dropped: np.ndarray
    """Sorted numbers of duplicates in the shard's pair."""


@dataclass(frozen=True)
class MergeTask:
    """One pair to write; picklable."""

    prefix: Path
    split: str
    pieces: tuple[Piece, ...]
    vocab: int
    manifest: dict[str, Any]
    """All of the manifest that is known before."""
    keep_parts: bool

    @property
    def size(self) -> int:
        """Bytes to copy, about."""
        return sum(piece.task.size for piece in self.pieces)

    @property
    def label(self) -> str:
        return str(self.prefix)

    @property
    def is_done(self) -> bool:
        manifest = read_manifest(self.prefix)
        same = manifest is not None and all(manifest.get(name) == self.manifest[name] for name in ("key", "part", "of"))
        return same and manifest is not None and is_whole(self.prefix, manifest)


@dataclass(frozen=True)
class Kept:
    """What of one shard's pair stays."""

    documents: int
    tokens: int
    dropped: np.ndarray


def plan_merge(
    job: SourceJob, results: Sequence[ShardResult], duplicates: Path | None, first_shard: int
) -> list[MergeTask]:
    """The pairs of a source, in order, both splits.

    `duplicates`: folder of `find_duplicates`, in which this source's shards begin at number `first_shard`.
    Raises DataError for a split without documents.
    """
    tasks: list[MergeTask] = []
    dropped = sum(len(duplicates_of(duplicates, first_shard + n)) for n in range(len(results))) if duplicates else 0
    for split in job.splits:
        kept = [
            _kept(task, split, result, duplicates, first_shard + n)
            for n, (task, result) in enumerate(zip(job.tasks, results, strict=True))
        ]
        groups = list(_groups(job, split, kept))
        shared = _shared_manifest(job, split, len(groups), results, dropped)
        units = {task.folder: result.units for task, result in zip(job.tasks, results, strict=True)}
        base = base_name(job.source.name, split)
        if not groups:
            raise DataError(
                f"{job.recipe.output / base}: no document is left for this split ({_why(results, dropped)}). Change "
                "validation_fraction or the filters, or add documents"
            )
        for part, pieces in enumerate(groups):
            name = base if len(groups) == 1 else f"{base}-{part:05d}-of-{len(groups):05d}"
            read = {piece.task.folder: units[piece.task.folder] for piece in pieces}
            manifest = {**shared, "part": part, "units": [unit for found in read.values() for unit in found]}
            tasks.append(
                MergeTask(
                    job.recipe.output / name,
                    split,
                    tuple(pieces),
                    job.tokenizer.vocab_size,
                    manifest,
                    job.recipe.keep_parts,
                )
            )
    return tasks


def _why(results: Sequence[ShardResult], dropped: int) -> str:
    read = sum(unit["documents"] for result in results for unit in result.units)
    reasons = "".join(f", {name} {count:,}" for name, count in _left_out(results, dropped).items())
    return (
        f"read {read:,}; left out{reasons or ' none'.strip(',')}; faults {sum(result.faults for result in results):,}"
    )


def _left_out(results: Sequence[ShardResult], dropped: int) -> dict[str, int]:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.left_out)
    if dropped:
        total["duplicate"] = dropped
    return dict(sorted(total.items()))


def _kept(task: ShardTask, split: str, result: ShardResult, duplicates: Path | None, shard: int) -> Kept:
    numbers = np.zeros(0, dtype=np.int64) if duplicates is None else duplicates_of(duplicates, shard)
    if not len(numbers):
        return Kept(result.documents[split], result.tokens[split], numbers)
    in_split = np.fromfile(task.folder / "held_out.raw", dtype=np.uint8) == (split == "validation")
    dropped = (np.cumsum(in_split) - 1)[numbers[in_split[numbers]]]
    tokens = int(read_index(task.prefix(split)).lengths[dropped].sum(dtype=np.int64))
    return Kept(result.documents[split] - len(dropped), result.tokens[split] - tokens, dropped)


def _groups(job: SourceJob, split: str, kept: Sequence[Kept]) -> Iterator[list[Piece]]:
    """Pieces of each pair. A pair is filled up to the limits document by document, so that neither the size of shards
    nor where they were cut matters."""
    room = _Room(job.recipe.max_prefix_tokens, job.recipe.max_prefix_documents)
    pieces: list[Piece] = []
    for task, left in zip(job.tasks, kept, strict=True):
        if not left.documents:
            continue
        if room.fits(left.documents, left.tokens):
            room.take(left.documents, left.tokens)
            total = left.documents + len(left.dropped)
            pieces.append(Piece(task, 0, total, True, left.dropped))
            continue
        lengths = np.asarray(read_index(task.prefix(split)).lengths).astype(np.int64)
        lengths[left.dropped] = 0
        stays = np.ones(len(lengths), dtype=np.int64)
        stays[left.dropped] = 0
        # tokens[i], documents[i]: of the first i documents
        tokens, documents = (np.concatenate(([0], np.cumsum(values))) for values in (lengths, stays))
        first = 0
        while first < len(lengths):
            stop = room.stop(documents, tokens, first)
            if stop == first:
                yield pieces
                pieces = []
                room.clear()
                continue
            count = int(documents[stop] - documents[first])
            room.take(count, int(tokens[stop] - tokens[first]))
            if count:
                pieces.append(Piece(task, first, stop, False, left.dropped))
            first = stop
    if pieces:
        yield pieces


class _Room:
    """What still goes into the pair that is being filled."""

    def __init__(self, tokens: int, documents: int) -> None:
        self._most_tokens, self._most_documents = tokens, documents
        self.clear()

    def clear(self) -> None:
        self._tokens = self._documents = 0

    def fits(self, documents: int, tokens: int) -> bool:
        return self._documents + documents <= self._most_documents and self._tokens + tokens <= self._most_tokens

    def take(self, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens

    def stop(self, documents: np.ndarray, tokens: np.ndarray, first: int) -> int:
        """Where to stop taking documents from `first` on, given how many of each come before every document.

        One that is beyond the limit by itself goes into an empty pair.
        """
        most_tokens = tokens[first] + self._most_tokens - self._tokens
        most_documents = documents[first] + self._most_documents - self._documents
        stop = min(
            int(np.searchsorted(tokens, most_tokens, side="right")),
            int(np.searchsorted(documents, most_documents, side="right")),
        )
        stop = max(first, stop - 1)
        return first + 1 if stop == first and self._documents == 0 else stop


def _shared_manifest(
    job: SourceJob, split: str, of: int, results: Sequence[ShardResult], dropped: int
) -> dict[str, Any]:
    """What the manifests of all pairs of a split say alike, and places for the rest."""
    tokenizer = job.tokenizer
    try:
        code = version("ouro-megatron")
    except PackageNotFoundError:
        code = "unknown"
    return {
        "key": job.key,
        "source": job.source.name,
        "split": split,
        "part": 0,
        "of": of,
        "documents": 0,
        "tokens": 0,
        "unigram_entropy": 0.0,
        "tokenizer": {
            "path": str(job.recipe.tokenizer_folder),
            "sha256": tokenizer.sha256,
            "vocab": tokenizer.vocab_size,
        },
        "code": {"version": code, "format": VERSION},
        "source_settings": job.source.model_dump(mode="json", exclude_defaults=True),
        "filters": job.source.filters.over(job.recipe.filters).model_dump(mode="json", exclude_defaults=True),
        "source_counts": {
            "read": sum(unit["documents"] for result in results for unit in result.units),
            "left_out": _left_out(results, dropped),
            "faults": sum(result.faults for result in results),
            "cut_files": sorted({path for result in results for path in result.cut_files}),
            "text_bytes": sum(result.text_bytes for result in results),
        },
        "units": [],
    }


def merge(task: MergeTask, pulse: Pulse) -> dict[str, Any]:
    """Writes one pair and its manifest, and removes the shards' copies of what it holds. Returns the manifest."""
    for suffix in (".manifest.json", *FILES):
        with_suffix(task.prefix, suffix).unlink(missing_ok=True)
    with PairWriter(task.prefix, token_dtype(task.vocab), count_vocab=task.vocab) as writer:
        for piece in task.pieces:
            writer.append(piece.task.prefix(task.split), piece.first, piece.stop, piece.dropped)
            pulse(Work(writer.documents, writer.tokens))
    assert writer.counts is not None
    manifest = {
        **task.manifest,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "unigram_entropy": entropy_of(writer.counts),
    }
    for suffix, digest in writer.hashes.items():
        size = with_suffix(task.prefix, suffix).stat().st_size
        manifest[FILES[suffix]] = {"bytes": size, "sha256": digest}
    write_json(with_suffix(task.prefix, ".manifest.json"), manifest)
    if not task.keep_parts:
        for piece in task.pieces:
            if piece.whole:
                # The index stays: after a kill the rest is planned from it.
                for suffix in (".bin", LOSS_SUFFIX):
                    with_suffix(piece.task.prefix(task.split), suffix).unlink(missing_ok=True)
    return manifest


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def entropy_of(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts stand for: the loss of the best context-free guess."""
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log(p)).sum())
