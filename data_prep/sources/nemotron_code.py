"""Nemotron-Pretraining-Code: the synthetic code; the rest of that corpus is metadata."""

from typing import ClassVar, Literal

from data_prep.formats.files import File
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError

_METADATA = (
    "Nemotron-Code-Metadata holds repository, commit and path of each file, but no text: point `path` at "
    "Synthetic-Code, or fetch the files it names and read them with kind: jsonl or parquet."
)


class NemotronCode(TextTable):
    """Nemotron-Pretraining-Code-v1 (or v2, with `text: content`): the folder Synthetic-Code."""

    kind: Literal["nemotron_code"]
    pattern: str = "**/*.parquet"

    fallback_keys: ClassVar[tuple[str, ...]] = ("id",)
    metadata_only: ClassVar[str] = _METADATA

    def files(self) -> list[File]:
        found = super().files()
        text = [file for file in found if "Nemotron-Code-Metadata" not in file.path]
        if not text:
            raise DataError(f"source {self.name}: {self.path}: {_METADATA}")
        return text
