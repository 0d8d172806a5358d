"""One shard of a source: the unit of parallel work and of resuming. Runs in processes of its own."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.dedup import save_sorted
from data_prep.document_encoder import DocumentEncoder
from data_prep.encode import open_tokenizer
from data_prep.filters import DocumentFilters, Filters, NgramList
from data_prep.long_text import LONG, long_text
from data_prep.memory import TooLargeError
from data_prep.pool import Pulse, Work
from data_prep.sources.base import Document, Fault, Unit
from data_prep.sources.registry import AnySource
from data_prep.writer import MAX_LENGTH, PairWriter, token_dtype
from ouro_megatron.errors import DataError

SPLITS = ("train", "validation")
_BATCH = 64
"""Documents tokenised at one time, at most."""
_BATCH_BYTES = 1 << 20
"""Bytes of text after which a batch is full, however few documents it holds."""
_LISTED_FAULTS = 10_000
"""Faults of a shard that are written down; further ones are counted."""
_PULSE_SECONDS = 0.25


@dataclass(frozen=True)
class ShardTask:
    """Units of one source to tokenise into FOLDER/train and FOLDER/validation; picklable."""

    source: AnySource
    units: tuple[Unit, ...]
    folder: Path
    """Exists when the shard is finished, and is whole then."""
    tokenizer: Path
    validation_fraction: float
    filters: Filters = field(default_factory=Filters)
    """The recipe's; the source's own ones are put over them."""
    chat_template: str | None = None
    hashes: Path | None = None
    """Where the documents' hashes go when duplicates are looked for. Kept after the shard is merged."""

    @property
    def is_done(self) -> bool:
        return (self.folder / "done.json").is_file() and (self.hashes is None or self.hashes.is_file())

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(unit.size for unit in self.units)

    @property
    def label(self) -> str:
        """How a person finds it: the source and its files."""
        first, last = self.units[0], self.units[-1]
        where = first.path if first.start == 0 and first.stop is None else f"{first.path} from {first.start}"
        more = f" to {Path(last.path).name} ({len(self.units)} files)" if len(self.units) > 1 else ""
        return f"{self.source.name}: {where}{more}"

    def prefix(self, split: str) -> Path:
        return self.folder / split

    @cached_property
    def document_filters(self) -> DocumentFilters:
        return self.source.filters.over(self.filters)


@dataclass
class ShardResult:
    """What done.json says. Numbers of documents and tokens are those before duplicates are left out."""

    documents: dict[str, int]
    """By split."""
    tokens: dict[str, int]
    text_bytes: int
    left_out: dict[str, int]
    """Documents that a filter left out, by its reason; "empty" among them."""
    faults: int
    cut_files: list[str]
    """Files whose end could not be read."""
    units: list[dict[str, Any]]
    """Each unit with the documents it gave and a digest of their text."""

    @property
    def work(self) -> Work:
        return Work(sum(self.documents.values()), sum(self.tokens.values()), self.text_bytes)


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


def read_result(task: ShardTask) -> ShardResult:
    """Raises DataError when the shard's mark cannot be read."""
    path = task.folder / "done.json"
    try:
        return ShardResult(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove {task.folder} and run it again") from error


def tokenise_shard(task: ShardTask, pulse: Pulse) -> ShardResult:
    """Makes the shard's folder: its two pairs, each document followed by the end-of-document id, faults and counts.

    It appears whole or not at all. Records that cannot be used are written down, not raised. Raises OSError for a disk
    that is full, DataError for what makes every document unusable.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    partial = task.folder.with_name(f"{task.folder.name}.part-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = _Shard(task, partial, pulse).run()
        with (partial / "done.json").open("w", encoding="utf-8") as file:
            json.dump(asdict(result), file)
            file.flush()
            os.fsync(file.fileno())
        if task.folder.exists():
            # Without its mark it was left by hand; with it, another machine was quicker with the same result.
            shutil.rmtree(task.folder)
        partial.replace(task.folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


class _Shard:
    """The state of one shard in the making."""

    def __init__(self, task: ShardTask, folder: Path, pulse: Pulse) -> None:
        self.task, self.folder, self.pulse = task, folder, pulse
        self.tokenizer, encoder = open_tokenizer(task.tokenizer)
        self.encoder = DocumentEncoder(
            self.tokenizer, encoder, task.tokenizer, task.chat_template, task.source.max_document_memory
        )
        decontaminate = task.filters.decontaminate
        self.ngrams = None if decontaminate is None else NgramList(decontaminate)
        self.left_out: Counter[str] = Counter()
        self.fault_count = 0
        self.cut_files: set[str] = set()
        self.units: list[dict[str, Any]] = []
        self.text_bytes = 0
        self._pulsed = time.monotonic()

    def run(self) -> ShardResult:
        dtype = token_dtype(self.tokenizer.vocab_size)
        with ExitStack() as stack:
            self.faults = stack.enter_context((self.folder / "faults.jsonl").open("w", encoding="utf-8"))
            self.hashes = stack.enter_context((self.folder / "hashes.raw").open("wb"))
            self.held_out = stack.enter_context((self.folder / "held_out.raw").open("wb"))
            self.writers = [stack.enter_context(PairWriter(self.folder / split, dtype)) for split in SPLITS]
            for batch in _batches(self._documents()):
                if batch[0].document.long_text is not None:
                    self._write_long(batch[0])
                else:
                    self._write(batch)
        if self.task.hashes is not None:
            save_sorted(self.folder / "hashes.raw", self.task.hashes)
        (self.folder / "hashes.raw").unlink()
        return ShardResult(
            documents={split: writer.documents for split, writer in zip(SPLITS, self.writers, strict=True)},
            tokens={split: writer.tokens for split, writer in zip(SPLITS, self.writers, strict=True)},
            text_bytes=self.text_bytes,
            left_out=dict(sorted(self.left_out.items())),
            faults=self.fault_count,
            cut_files=sorted(self.cut_files),
            units=self.units,
        )

    def report(self, fault: Fault) -> None:
        self.fault_count += 1
        if fault.ends_unit:
            self.cut_files.add(fault.path)
        if self.fault_count <= _LISTED_FAULTS:
            self.faults.write(json.dumps({"source": self.task.source.name, **asdict(fault)}) + "\n")

    def _documents(self) -> Iterator["_Read"]:
        """Each document that stays."""
        source = self.task.source.with_scratch(self.folder)
        for unit in self.task.units:
            digest = hashlib.blake2b(digest_size=16)
            count = 0
            for document in source.read(unit, self.report):
                place = f"document {count} from {unit.start}" if unit.start else f"document {count}"
                count += 1
                try:
                    hashed, size = content_hash(document)
                except UnicodeEncodeError as error:
                    self.report(Fault(unit.path, place, f"half a surrogate pair at character {error.start}"))
                    continue
                digest.update(hashed)
                self.text_bytes += size
                try:
                    reason = self._reason(document, size)
                except TooLargeError as error:
                    self.report(Fault(unit.path, place, str(error)))
                    continue
                if reason is not None:
                    self.left_out[reason] += 1
                else:
                    with self._spilled(document, size) as kept:
                        yield _Read(kept, hashed, size, unit.path, place)
                self._beat()
            self.units.append({**asdict(unit), "documents": count, "digest": digest.hexdigest()})

    @contextmanager
    def _spilled(self, document: Document, size: int) -> Iterator[Document]:
        """A text that its reader held although it is long goes to a file, for the encoder not to hold it as well."""
        if size <= LONG or document.messages is not None or document.loss_spans is not None or not document.text:
            yield document
            return
        text = document.text
        pieces = (text[at : at + LONG].encode() for at in range(0, len(text), LONG))
        with closing(long_text(pieces, self.folder)) as spilled:
            yield replace(document, text="", long_text=spilled)

    def _reason(self, document: Document, size: int) -> str | None:
        """Why the document is left out. Raises TooLargeError when it would stay and must be held, all `size` bytes."""
        if not document.text and document.messages is None and document.long_text is None:
            return "empty"
        reason = self.task.document_filters.reason(document)
        if reason is not None:
            return reason
        self.encoder.check_size(document, size)
        memory = self.task.source.max_document_memory
        return "contaminated" if self.ngrams is not None and self.ngrams.occurs_in(document, memory) else None

    def _write(self, batch: Sequence["_Read"]) -> None:
        encoded = self.encoder.encode([item.document for item in batch])
        good = np.array([isinstance(outcome, int) and outcome <= MAX_LENGTH for outcome in encoded.outcome])
        for item, outcome in zip(batch, encoded.outcome, strict=True):
            if isinstance(outcome, str) or outcome > MAX_LENGTH:
                self.report(Fault(item.path, item.place, outcome if isinstance(outcome, str) else _too_long(outcome)))
        fraction = self.task.validation_fraction
        held_out = np.array([item.document.is_below(fraction) for item in batch])
        for writer, chosen in zip(self.writers, (good & ~held_out, good & held_out), strict=True):
            if chosen.any():
                ids, lengths, loss = encoded.only(chosen)
                writer.add_many(ids, lengths, loss)
        self._keep_hashes([item.hashed for item, ok in zip(batch, good, strict=True) if ok], held_out[good])

    def _write_long(self, item: "_Read") -> None:
        text = item.document.long_text
        assert text is not None
        held_out = item.document.is_below(self.task.validation_fraction)
        try:
            length = self.writers[held_out].add_long(lambda put: self.encoder.encode_long(text, put))
        except TooLargeError as error:
            self.report(Fault(item.path, item.place, str(error)))
            return
        if length is None:
            self.report(Fault(item.path, item.place, _too_long(None)))
        else:
            self._keep_hashes([item.hashed], np.array([held_out]))

    def _keep_hashes(self, hashes: Sequence[bytes], held_out: np.ndarray) -> None:
        if self.task.hashes is not None:
            self.hashes.write(b"".join(hashes))
            self.held_out.write(held_out.astype(np.uint8).tobytes())

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._pulsed >= _PULSE_SECONDS:
            self._pulsed = now
            documents = sum(writer.documents for writer in self.writers)
            self.pulse(Work(documents, sum(writer.tokens for writer in self.writers), self.text_bytes))


def content_hash(document: Document) -> tuple[bytes, int]:
    """What makes two documents the same, 128 bits of a hash, and the bytes that were hashed.

    Raises UnicodeEncodeError for text that is not Unicode.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    for block in _content(document):
        digest.update(block)
        size += len(block)
    return digest.digest(), size


def _content(document: Document) -> Iterator[bytes]:
    """What makes a document this one, in pieces: a long turn is not held in all forms at one time."""
    if document.long_text is not None:
        yield from document.long_text.blocks()
    elif document.messages is None:
        yield document.text.encode()
    else:
        encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
        yield from (piece.encode() for piece in encoder.iterencode(document.messages))


class _Read(NamedTuple):
    """A document and where it came from."""

    document: Document
    hashed: bytes
    size: int
    """Bytes of UTF-8."""
    path: str
    place: str


def _too_long(tokens: int | None) -> str:
    return f"{'too many' if tokens is None else tokens} tokens; an index holds {MAX_LENGTH}"


def _batches(documents: Iterator[_Read]) -> Iterator[list[_Read]]:
    """Documents together, up to a number and a size. A long text stands alone and is used before the next is read."""
    batch: list[_Read] = []
    size = 0
    for item in documents:
        if item.document.long_text is not None:
            if batch:
                yield batch
                batch, size = [], 0
            yield [item]
            continue
        batch.append(item)
        size += item.size
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
