"""JSON lines, plain or compressed: one object a line, its text in one field."""

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO

import zstandard

from data_prep.sources.base import Document, SourceBase
from ouro_megatron.errors import DataError


class JsonLines(SourceBase):
    kind: Literal["jsonl"]
    path: Path
    """A file, or a folder searched with `pattern`."""
    pattern: str = "**/*.json*"
    """For a folder; .gz and .zst files are opened by their suffix."""
    text: str = "text"
    """Field of the document's text."""
    key: str | None = None
    """Field that decides about holding out, such as "url"; the text itself when absent."""

    def files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        found = sorted(file for file in self.path.glob(self.pattern) if file.is_file())
        if not found:
            raise DataError(
                f"source {self.name}: {self.path} is no file, and no file below it matches {self.pattern!r}"
            )
        return found

    def read(self, file: Path) -> Iterator[Document]:
        read = 0
        try:
            with _open(file) as stream:
                for line in stream:
                    if line.strip():
                        yield self._document(line)
                    read += 1
        except (OSError, EOFError, ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"source {self.name}: {file}, line {read + 1}: {what}") from error

    def _document(self, line: str) -> Document:
        fields = json.loads(line)
        text = fields[self.text]
        if not isinstance(text, str):
            raise ValueError(f"field {self.text!r} is a {type(text).__name__}, not text")
        return Document(text if self.key is None else str(fields[self.key]), text)


@contextmanager
def _open(file: Path) -> Iterator[TextIO]:
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8") as text:
            yield text
    elif file.suffix == ".zst":
        with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
            yield io.TextIOWrapper(reader, encoding="utf-8")
    else:
        with file.open(encoding="utf-8") as text:
            yield text
