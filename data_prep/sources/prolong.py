"""ProLong-64K: packs of 65,536 Llama-3 ids in MDS shards, turned back into the documents they hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_prep.formats.files import File, find_files
from data_prep.formats.mds import Shard, read_index, read_mds
from data_prep.long_text import LONG, Spilled, long_text
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.llama_bytes import BEGIN, END, END_OF_TURN, joined, llama_table
from data_prep.sources.tabular import FileSource, is_taken
from ouro_megatron.errors import DataError

_COLUMNS = ("input_ids", "indices", "mask", "domain")


class ProLong(FileSource):
    """prolong-data-64K and its like: DOMAIN/procNN-64/index.json with MDS shards of Llama-3 ids.

    Each document of a pack becomes a document. One that the edge of a pack cuts comes in pieces, of which a character
    cut in two is left out; `join` puts the pieces of neighbouring rows together again.
    """

    kind: Literal["prolong"]
    pattern: str = "**/index.json"
    tokenizer: Path
    """Folder of the Llama-3 tokenizer (tokenizer.json); the ids mean nothing without it."""
    domains: tuple[str, ...] = ()
    """Folders to use, such as book-65536; all when left out."""
    join: bool = False
    """Join a document cut at the end of a row with the beginning of the next row, if that has no begin mark. A
    folder of shards is then one unit."""

    has_columns: ClassVar[bool] = False

    def folders(self) -> list[list[Shard]]:
        """Shards by index. Raises DataError for shards that an index names and that are not there."""
        indices = [file for file in self.files() if self._is_chosen(file)]
        for domain in self.domains:
            if not any(f"/{domain}/" in file.path for file in indices):
                raise DataError(f"source {self.name}: no index.json in a folder {domain} below {self.path}")
        if not indices:
            raise DataError(f"source {self.name}: no index.json below {self.path}")
        found = [read_index(file.path, self.storage_options) for file in indices]
        return [shards for shards in found if shards]

    def _is_chosen(self, file: File) -> bool:
        return not self.domains or any(f"/{domain}/" in file.path for domain in self.domains)

    def units(self, target_bytes: int) -> list[Unit]:
        llama_table(self.tokenizer)
        units: list[Unit] = []
        for shards in self.folders():
            files = self._present(shards)
            kept = [shard for shard in shards if shard.path in files]
            for shard in kept:
                if "input_ids" not in shard.names:
                    raise DataError(
                        f"source {self.name}: {shard.path} has no column 'input_ids', but: {', '.join(shard.names)}"
                    )
            if self.join:
                stamp = "/".join(files[shard.path].stamp for shard in kept)
                units.append(
                    Unit(f"{shards[0].folder}/index.json", sum(file.size for file in files.values()), stamp=stamp)
                )
            else:
                units.extend(unit for shard in kept for unit in _row_ranges(shard, files[shard.path], target_bytes))
        return units

    def _present(self, shards: Sequence[Shard]) -> dict[str, File]:
        """Files of the shards, by the path of the shard."""
        folder = shards[0].folder
        there = {file.name: file for file in _listing(self, folder)}
        found = {shard.path: there.get(shard.basename) or there.get(shard.zipped or "") for shard in shards}
        missing = [path for path, file in found.items() if file is None]
        if missing and not self.partial:
            raise DataError(
                f"source {self.name}: {folder}/index.json lists {missing[0].rsplit('/', 1)[-1]}, which is not there "
                f"({len(missing)} of {len(shards)} shards are missing). Finish the download, or set `partial: true`"
            )
        unlisted = sorted(set(there) - {name for shard in shards for name in (shard.basename, shard.zipped)})
        if unlisted and not self.partial:
            raise DataError(
                f"source {self.name}: {folder}/{unlisted[0]} is not in its index.json: the index belongs to another "
                "state of the upload. Download both again, or set `partial: true` to leave it out"
            )
        return {path: file for path, file in found.items() if file is not None}

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        folder, _, name = unit.path.rpartition("/")
        shards = read_index(f"{folder}/index.json", self.storage_options)
        reader = _Reader(llama_table(self.tokenizer), report, self._scratch)
        if name == "index.json":
            present = self._present(shards)
            chosen = [(shard, 0, shard.samples) for shard in shards if shard.path in present]
        else:
            shard = next((shard for shard in shards if shard.path == unit.path), None)
            if shard is None:
                raise DataError(f"source {self.name}: {unit.path} is not in its index.json any more")
            chosen = [(shard, unit.start, shard.samples if unit.stop is None else unit.stop)]
        for document in self._documents(reader, chosen, report):
            if is_taken(document, self.take):
                yield document

    def _documents(
        self, reader: "_Reader", chosen: Sequence[tuple[Shard, int, int]], report: Report
    ) -> Iterator[Document]:
        for shard, start, stop in chosen:
            for row, values in read_mds(shard, start, stop, _COLUMNS, report, self.storage_options):
                try:
                    pieces = reader.pieces(values)
                except ValueError as error:
                    report(Fault(shard.path, f"row {row}", str(error)))
                    continue
                domain = values.get("domain") or shard.folder.split("/")[-2]
                yield from reader.documents(pieces, shard.path, row, domain, self.join)
        yield from reader.flush()


def _listing(source: ProLong, folder: str) -> list[File]:
    """MDS files of a folder, plain or compressed."""
    try:
        return find_files(source.name, folder, "*.mds{,.*}", source.storage_options)
    except DataError:  # none at all: every shard is missing
        return []


def _row_ranges(shard: Shard, file: File, target_bytes: int) -> list[Unit]:
    """A shard's rows in runs of about `target_bytes`."""
    count = max(1, min(shard.samples, round(shard.bytes / target_bytes)))
    if count == 1:
        return [Unit(shard.path, file.size, stamp=file.stamp)]
    bounds = [shard.samples * index // count for index in range(count + 1)]
    return [Unit(shard.path, file.size // count, start, stop, file.stamp) for start, stop in pairwise(bounds)]


@dataclass
class _Piece:
    """What a row holds of one document."""

    data: bytes
    begins: bool
    """Has the mark of a document's beginning."""
    ends: bool
    """Has the mark of a document's end."""
    learned: list[tuple[int, int]] | None = None
    """Half-open byte ranges that count in the loss; None: all."""


@dataclass
class _Reader:
    table: Sequence[bytes]
    report: Report
    scratch: Path | None = None
    """Takes a joined document that is too long for memory."""
    open: list[_Piece] = field(default_factory=list)
    """Pieces of a document whose end has not come yet."""
    long: Spilled | None = None
    """Bytes of the pieces before those, when they are many."""
    at: tuple[str, str, str] = ("", "", "")
    """File, place and domain of the first open piece."""

    def pieces(self, values: dict[str, Any]) -> list[_Piece]:
        """The documents of a row. Raises ValueError when its ids or bounds cannot be right."""
        ids = np.asarray(values["input_ids"]).reshape(-1)
        bounds = values.get("indices")
        bounds = np.array([[0, len(ids)]]) if bounds is None else np.asarray(bounds, dtype=np.int64).reshape(-1, 2)
        if (bounds[:, 0] > bounds[:, 1]).any() or (bounds > len(ids)).any():
            raise ValueError(f"its document bounds do not lie in its {len(ids)} ids")
        mask = values.get("mask")
        found = []
        for start, stop in bounds.tolist():
            piece = ids[start:stop].tolist()
            if piece:
                found.append(self._piece(piece, None if mask is None else np.asarray(mask).reshape(-1)[start:stop]))
        return found

    def _piece(self, ids: list[int], mask: np.ndarray | None) -> _Piece:
        first, last = 0, len(ids)
        while first < last and ids[first] == BEGIN:
            first += 1
        begins = first > 0
        ends = last > first and ids[last - 1] == END
        if ends:
            last -= 1
            if last > first and ids[last - 1] == END_OF_TURN:
                last -= 1
        kept = ids[first:last]
        data = joined(self.table, kept)
        learned = None if mask is None else _byte_ranges([len(self.table[number]) for number in kept], mask[first:last])
        return _Piece(data, begins, ends, learned)

    def documents(self, pieces: Sequence[_Piece], path: str, row: int, domain: str, join: bool) -> Iterator[Document]:
        for index, piece in enumerate(pieces):
            continues = join and index == 0 and (bool(self.open) or self.long is not None) and not piece.begins
            if not continues:
                yield from self.flush()
                self.at = (path, f"row {row}", domain)
            self.open.append(piece)
            if join:
                self._spill()
            if piece.ends or not join or index < len(pieces) - 1:
                yield from self.flush()

    def _spill(self) -> None:
        """Open pieces go to a file when they are long together. A loss mask, which only short chats have, stays."""
        size = sum(len(piece.data) for piece in self.open)
        if self.scratch is None or size <= LONG or any(piece.learned is not None for piece in self.open):
            return
        self.long = self.long or Spilled(self.scratch)
        for piece in self.open:
            self.long.write(piece.data)
        self.open = []

    def flush(self) -> Iterator[Document]:
        """The open document."""
        long, self.long = self.long, None
        if long is not None and self.scratch is not None:
            for piece in self.open:
                long.write(piece.data)
            self.open = []
            yield from self._long_document(long, self.scratch)
            return
        pieces, self.open = self.open, []
        if not pieces:
            return
        path, where, domain = self.at
        data = b"".join(piece.data for piece in pieces)
        first, last = _whole_characters(data)
        try:
            text = data[first:last].decode("utf-8")
        except UnicodeDecodeError as error:
            self.report(Fault(path, where, f"its ids do not give UTF-8 text: {error.reason} at byte {error.start}"))
            return
        if text:
            yield Document(text, text, _spans(pieces, data, first, last), {"domain": domain})

    def _long_document(self, long: Spilled, scratch: Path) -> Iterator[Document]:
        path, where, domain = self.at
        head, tail = b"".join(long.part(0, 8)), b"".join(long.part(long.size - 8, long.size))
        first, last = _whole_characters(head)[0], long.size - 8 + _whole_characters(tail)[1]
        try:
            text = long_text(long.part(first, last), scratch)
        except UnicodeDecodeError as error:
            self.report(Fault(path, where, f"its ids do not give UTF-8 text: {error.reason} at byte {error.start}"))
            return
        finally:
            long.close()
        try:
            yield Document("", "", fields={"domain": domain}, long_text=text)
        finally:
            text.close()


def _whole_characters(data: bytes) -> tuple[int, int]:
    """Range without a character's rest at the beginning and a character's first bytes at the end."""
    first, last = 0, len(data)
    while first < min(3, last) and data[first] & 0xC0 == 0x80:
        first += 1
    for back in range(1, min(3, last - first) + 1):
        lead = data[last - back]
        if lead & 0xC0 == 0x80:
            continue
        needed = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
        if needed > back:
            last -= back
        break
    return first, last


def _byte_ranges(sizes: Sequence[int], mask: np.ndarray) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *sizes])
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (mask != 0).astype(np.int8), [0]))))
    return [(int(ends[start]), int(ends[stop])) for start, stop in edges.reshape(-1, 2)]


def _spans(pieces: Sequence[_Piece], data: bytes, first: int, last: int) -> tuple[tuple[int, int], ...] | None:
    """Character ranges that count in the loss, from the byte ranges of the pieces."""
    if all(piece.learned is None for piece in pieces):
        return None
    # chars[i]: characters that begin before byte i
    begins = (np.frombuffer(data[first:last], np.uint8) & 0xC0) != 0x80
    chars = np.concatenate(([0], np.cumsum(begins)))
    spans, at = [], 0
    for piece in pieces:
        for start, stop in piece.learned if piece.learned is not None else [(0, len(piece.data))]:
            low, high = (int(chars[min(max(at + byte - first, 0), last - first)]) for byte in (start, stop))
            if high > low:
                spans.append((low, high))
        at += len(piece.data)
    return tuple(spans)
