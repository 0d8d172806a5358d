"""A folder of plain text files, each one document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_prep.sources.base import Document, Fault, Report, SourceBase, Unit
from data_prep.sources.files import find_files, unit_of


class TextFolder(SourceBase):
    kind: Literal["text_folder"]
    path: Path
    pattern: str = "**/*.txt"
    """Glob below `path`."""

    def units(self, target_bytes: int) -> list[Unit]:
        return [unit_of(file) for file in find_files(self.name, self.path, self.pattern)]

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        file = Path(unit.path)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            report(Fault(unit.path, f"byte {error.start}", f"not UTF-8: {error.reason}"))
        except OSError as error:
            report(Fault(unit.path, "byte 0", f"cannot be read: {error.strerror}", ends_unit=True))
        else:
            yield Document(str(file.relative_to(self.path)) if file != self.path else file.name, text)
