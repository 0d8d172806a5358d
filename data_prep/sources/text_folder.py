"""A folder of plain text files, each one document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_prep.sources.base import Document, SourceBase
from ouro_megatron.errors import DataError


class TextFolder(SourceBase):
    kind: Literal["text_folder"]
    path: Path
    pattern: str = "**/*.txt"
    """Glob below `path`."""

    def files(self) -> list[Path]:
        found = sorted(file for file in self.path.glob(self.pattern) if file.is_file())
        if not found:
            raise DataError(f"source {self.name}: no file matches {self.pattern!r} below {self.path}")
        return found

    def read(self, file: Path) -> Iterator[Document]:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"source {self.name}: {file} cannot be read as UTF-8 text: {error}") from error
        yield Document(str(file.relative_to(self.path)), text)
