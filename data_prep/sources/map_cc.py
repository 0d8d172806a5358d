"""MAP-CC: five families of Chinese text, each one gzip stream of JSON lines that was cut into parts of 40 GB."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import ClassVar, Literal

from data_prep.formats.files import File, find_files
from data_prep.formats.gzip_parts import GzipParts
from data_prep.formats.lines import fields_of, row_of
from data_prep.formats.long_json import kept_while_used
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.tabular import TextTable, is_taken
from ouro_megatron.errors import DataError

_PART = re.compile(r"^(?P<family>.+\.gz)\.part(?P<index>\d+|[a-z]{2})$")
_LARGE = 4 << 30
"""Bytes of a stream that need an index."""
_PUBLISHED = {"zh_cc": 36, "zh_books": 3, "zh_baike": 1, "zh_others": 2, "zh_papers": 2}
"""Parts of each family as published."""


class MapCC(TextTable):
    """MAP-CC: zh_cc, zh_baike, zh_books, zh_others, zh_papers, each a gzip stream in numbered parts.

    A stream can only be inflated from its beginning, until `ouro data index` has noted places to start from; then it
    is cut into ranges like any other file. Without an index a family is one unit, for one worker.
    """

    kind: Literal["map_cc"]
    pattern: str = "**/*.jsonl.gz{,.part*}"
    families: tuple[Literal["zh_cc", "zh_baike", "zh_books", "zh_others", "zh_papers"], ...] = ()
    """Families to use; all when left out."""
    index: str | None = None
    """Folder of the indices that `ouro data index` makes; beside the parts when left out."""
    unindexed: bool = False
    """Read large families without an index, each as one unit that begins anew after a kill."""

    fallback_keys: ClassVar[tuple[str, ...]] = ("url", "id")

    def gzip_streams(self) -> list[GzipParts]:
        """Each family with its parts in the order of their numbers. Raises DataError naming a part that is missing."""
        groups: dict[str, list[tuple[int, File]]] = defaultdict(list)
        for file in find_files(self.name, self.path, self.pattern, self.storage_options):
            match = _PART.match(file.name)
            if match is None:
                if not file.name.endswith(".gz"):
                    continue
                groups[file.path].append((0, file))  # joined by someone
            else:
                groups[f"{file.folder}/{match['family']}"].append((_number(match["index"]), file))
        if self.families:
            groups = defaultdict(
                list, {path: parts for path, parts in groups.items() if _family(path) in self.families}
            )
        absent = [name for name in self.families if name not in {_family(path) for path in groups}]
        if absent or not groups:
            raise DataError(f"source {self.name}: {self.path} has no part of {absent[0] if absent else 'any family'}")
        return [self._stream(path, sorted(parts, key=lambda part: part[0])) for path, parts in sorted(groups.items())]

    def _stream(self, path: str, parts: list[tuple[int, File]]) -> GzipParts:
        numbers = [number for number, _ in parts]
        if numbers != [0]:
            published = _PUBLISHED.get(_family(path), 0) if parts[0][1].name.endswith(f"{numbers[0]:02d}") else 0
            first = 0 if numbers[0] == 0 else 1
            expected = range(first, max(numbers[-1], 0 if self.partial else published) + 1)
            missing = [number for number in expected if number not in numbers]
            if missing and not (self.partial and missing[0] > first):
                raise DataError(
                    f"source {self.name}: {path}: part {missing[0]:02d} is missing ({len(numbers)} of "
                    f"{len(expected)} are there). The parts are slices of one gzip stream: nothing after a missing one "
                    "can be read. Download it; or, to use the parts before it, set `partial: true`"
                )
            if missing:
                parts = [part for part in parts if part[0] < missing[0]]
        files = tuple(file for _, file in parts)
        return GzipParts(path, files, self.storage_options, self.index)

    def units(self, target_bytes: int) -> list[Unit]:
        streams = self.gzip_streams()
        for stream in streams:
            if stream.size > _LARGE and not self.unindexed and stream.index() is None:
                raise DataError(
                    f"source {self.name}: {stream.path} is one gzip stream of {stream.size / 1e9:,.0f} GB, which one "
                    "worker alone would have to read, from its beginning after each kill. Make its index first: "
                    "ouro data index RECIPE (one pass). Or set `unindexed: true`"
                )
            self._check_first_row(stream)
        return [unit for stream in streams for unit in stream.units(target_bytes)]

    def _check_first_row(self, stream: GzipParts) -> None:
        found: list[Fault] = []
        whole = Unit(stream.path, stream.size)
        for line in stream.lines(whole, found.append, scratch=Path(gettempdir())):
            try:
                row = fields_of(line)
            except ValueError:
                continue
            if row is not None:
                if self.text not in row:
                    raise DataError(
                        f"source {self.name}: {stream.path}: no field {self.text!r}, but: {', '.join(row)}. Set `text`"
                    )
                return

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        stream = next((stream for stream in self.gzip_streams() if stream.path == unit.path), None)
        if stream is None:
            raise DataError(f"source {self.name}: {unit.path} is not there any more")
        apart = self.apart(self.text)
        for line in stream.lines(unit, report, cut_is_expected=self.partial, scratch=self._scratch):
            try:
                row = row_of(line, apart)
            except (ValueError, RecursionError) as error:
                report(Fault(unit.path, line.where, str(error)))
                continue
            if row is None or not self.is_kept(row):
                continue
            with kept_while_used(row, apart):
                try:
                    document = self.document(row, self._keys)
                except ValueError as error:
                    report(Fault(unit.path, line.where, str(error)))
                    continue
                if is_taken(document, self.take):
                    yield document


def _family(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0]


def _number(index: str) -> int:
    """part07 is 7; mirrors name parts partaa, partab, ..., which count from 0."""
    if index.isdigit():
        return int(index)
    return (ord(index[0]) - ord("a")) * 26 + ord(index[1]) - ord("a")
