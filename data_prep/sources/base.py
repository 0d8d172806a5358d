"""What a source of documents is: files that can be listed, and documents read from one file at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Document:
    """`key` decides whether the document is held out; documents that share text should share the key."""

    key: str
    text: str


class SourceBase(BaseModel):
    """Fields of every source; its own fields and `files` and `read` come with each kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Output files are called this."""


class Source(Protocol):
    name: str

    def files(self) -> list[Path]:
        """All input files, always in the same order. Raises DataError when there are none."""

    def read(self, file: Path) -> Iterator[Document]:
        """The documents of one file, in order. Raises DataError naming the file and line."""
