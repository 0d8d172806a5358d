"""What sources of rows share: files found and checked before any work, rows turned into documents one by one."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from data_prep.formats.compression import codec_of
from data_prep.formats.files import File, find_files, is_url
from data_prep.formats.gzip_parts import GzipParts
from data_prep.formats.rows import columns_of, format_of, read_rows, split_file
from data_prep.formats.tables import Column, Row
from data_prep.long_text import LongText
from data_prep.sources.base import Document, Fault, Report, SourceBase, Unit
from ouro_megatron.errors import DataError

_NUMBERED = re.compile(r"^(?P<stem>.*?)-?(?P<index>\d+)-of-(?P<total>\d+)(?P<suffix>.*)$")
_TEXT_NAMES = ("text", "content", "raw_content", "body", "document")
_SCORES = ("language", "lang", "language_score", "lang_score", "score", "source", "domain", "category")
_FILES_A_FOLDER = 3
"""Looked at for their columns; more only where these hold no rows."""


def is_taken(document: Document, share: float) -> bool:
    """A share of documents by a hash of their key; not correlated with the hash that holds documents out."""
    return share >= 1.0 or document.is_below(share, b"take\0")


class FileSource(SourceBase):
    """Files below a path. Fields that all corpora share."""

    path: str
    """A file, a folder, or a URL that fsspec knows (s3://, hf://, file://); may end in a pattern of its own."""
    pattern: str
    """Files below `path`: `*`, `?`, `{a,b}`, and `**/` for any number of folders."""
    partial: bool = False
    """Take what is there although the names of the files say that others belong to them."""
    take: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the documents to use, chosen by a hash of their keys. To repeat documents, weight the blend instead."""
    where: Mapping[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Columns and the values to keep, such as {domain: [math, science]}; other rows are left out."""
    storage_options: Mapping[str, Any] = Field(default_factory=dict)
    """Passed to fsspec for a URL, such as {anon: true}."""

    has_columns: ClassVar[bool] = True

    @model_validator(mode="after")
    def _columns_for_where(self) -> "FileSource":
        if self.where and not self.has_columns:
            raise ValueError(f"`where` chooses rows by their columns; {', '.join(self.where)}: there are none here")
        return self

    def files(self) -> list[File]:
        """All files, in an order that never changes. Raises DataError when one is missing."""
        found = find_files(self.name, self.path, self.pattern, self.storage_options)
        if len(found) > 1 and not self.partial:
            check_numbers(self.name, found)
        return found

    def units_of(self, files: Sequence[File], target_bytes: int) -> list[Unit]:
        """Units of files in their order; the footers of remote files are read side by side."""
        if not any(is_url(file.path) for file in files):
            return [unit for file in files for unit in split_file(file, target_bytes, self.storage_options)]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda file: split_file(file, target_bytes, self.storage_options), files)
            return [unit for units in found for unit in units]

    def sample_columns(self, files: Sequence[File]) -> Iterator[tuple[File, list[Column]]]:
        """Columns of one file with rows in each folder. Unreadable files are left to reading, which reports them."""
        folders: dict[str, list[File]] = defaultdict(list)
        for file in files:
            folders[file.folder].append(file)
        for members in folders.values():
            for file in members[:_FILES_A_FOLDER]:
                try:
                    columns = columns_of(file, self.storage_options)
                except ValueError:
                    continue
                if columns is not None:
                    yield file, columns
                    break

    def is_kept(self, row: Mapping[str, Any]) -> bool:
        return all(row.get(name) in values for name, values in self.where.items())


def check_numbers(source: str, files: Sequence[File]) -> None:
    """Raises DataError when files numbered NAME-00003-of-00010 are not all there, or were uploaded in two cuts."""
    groups: dict[tuple[str, str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for file in files:
        if match := _NUMBERED.match(file.name):
            group = groups[file.folder, match["stem"], match["suffix"]]
            group[int(match["total"])].add(int(match["index"]))
    for (folder, stem, suffix), totals in groups.items():
        if len(totals) > 1:
            cuts = " and ".join(f"-of-{total}" for total in sorted(totals))
            raise DataError(
                f"source {source}: {folder} holds files of {stem!r} numbered {cuts}: probably the same rows twice. "
                "Remove one set, choose with `pattern`, or set `partial: true` to take both"
            )
        ((total, present),) = totals.items()
        first = 1 if total in present and 0 not in present else 0
        missing = sorted(set(range(first, first + total)) - present)
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise DataError(
                f"source {source}: {folder}: {len(missing)} of the {total} files {stem}-*-of-*{suffix} are missing "
                f"(numbers {shown}). Finish the download, or set `partial: true` to use what is there"
            )


class TextTable(FileSource):
    """Rows with the text in one column. Corpora set the defaults."""

    text: str = "text"
    """Column of the text."""
    key: str | None = None
    """Column that decides about holding out, such as "url"; the text itself where it is absent."""
    fields: tuple[str, ...] = _SCORES
    """Columns that filters may ask for; those that exist are read. JSON lines carry all their fields."""

    fallback_keys: ClassVar[tuple[str, ...]] = ()
    """Columns tried when `key` is not given."""
    metadata_only: ClassVar[str] = ""
    """What to say about files without text that belong to the corpus."""

    def units(self, target_bytes: int) -> list[Unit]:
        files = self.files()
        self.check_columns(files)
        return self.units_of(files, target_bytes)

    def gzip_streams(self) -> list[GzipParts]:
        """Those files that an index lets many workers read."""
        return [
            GzipParts(file.path, (file,), self.storage_options)
            for file in self.files()
            if codec_of(file.path) == "gzip" and format_of(file.path) == "json"
        ]

    def check_columns(self, files: Sequence[File]) -> None:
        """Raises DataError naming the first file whose columns do not fit."""
        keyed = self.key is None
        looked = False
        for file, columns in self.sample_columns(files):
            looked = True
            names = {column.name: column.is_text for column in columns}
            keyed = keyed or self.key in names
            if self.text not in names:
                raise DataError(self._no_text(file, columns))
            if not names[self.text]:
                raise DataError(f"source {self.name}: {file.path}: column {self.text!r} does not hold text")
            self._check_where(file, names)
        if looked and not keyed:
            raise DataError(f"source {self.name}: no column {self.key!r} (`key`) in {files[0].path} or its like")

    def _check_where(self, file: File, names: Mapping[str, bool]) -> None:
        unknown = [name for name in self.where if name not in names]
        if unknown and format_of(file.path) != "json":
            raise DataError(
                f"source {self.name}: {file.path} has no column {unknown[0]!r} (`where`), but: {', '.join(names)}"
            )

    def _no_text(self, file: File, columns: Sequence[Column]) -> str:
        names = [column.name for column in columns]
        message = f"source {self.name}: {file.path} has no column {self.text!r}, but: {', '.join(names)}."
        likely = [name for name in _TEXT_NAMES if name in names]
        if likely:
            return f"{message} Set `text: {likely[0]}` if that is the text."
        if self.metadata_only:
            return f"{message} {self.metadata_only}"
        return f"{message} Set `text` to the column of the text; a subset with metadata only cannot be used."

    @property
    def _keys(self) -> tuple[str, ...]:
        return (self.key,) if self.key is not None else self.fallback_keys

    @property
    def wanted(self) -> tuple[str, ...]:
        """Columns that are read where they exist; () for all."""
        return (self.text, *self._keys, *self.fields, *self.where)

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        rows = read_rows(unit, self.wanted, report, self.storage_options, self.apart(self.text))
        yield from self.documents_of(rows, unit, report)

    def documents_of(self, rows: Iterable[Row], unit: Unit, report: Report) -> Iterator[Document]:
        """Those of rows of one unit. What is wrong with a row goes to `report`."""
        share = self.share(unit)
        for where, row in rows:
            if self.where and not self.is_kept(row):
                continue
            try:
                document = self.document(row, self._keys)
            except (ValueError, RecursionError) as error:
                report(Fault(unit.path, where, str(error)))
                continue
            if is_taken(document, share):
                yield document

    def share(self, unit: Unit) -> float:
        """Share of the unit's documents to use."""
        return self.take

    def document(self, row: dict[str, Any], keys: Sequence[str]) -> Document:
        """Raises ValueError when the row holds no text."""
        key = next((str(row[name]) for name in keys if row.get(name) not in (None, "")), None)
        if isinstance(long := row.get(self.text), LongText):
            row.pop(self.text)
            return Document(key or "", "", fields=row, long_text=long)
        text = text_of(row, self.text)
        row.pop(self.text)
        return Document(text if key is None else key, text, fields=row)


def text_of(row: Mapping[str, Any], name: str) -> str:
    """The string of a column. Raises ValueError when it is absent, no text, or cannot be written as UTF-8."""
    if name not in row:
        raise ValueError(f"no field {name!r}")
    value = row[name]
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}, not text"
        raise ValueError(f"field {name!r} is {kind}")
    if not value.isascii():
        value.encode("utf-8")  # half of a surrogate pair, which JSON can spell, is no character
    return value
