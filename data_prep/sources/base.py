"""What a source of documents is: units of work that can be listed, and documents read from one unit at a time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from data_prep.filters import DocumentFilters
from data_prep.long_text import LongText
from data_prep.memory import DOCUMENT_MEMORY, LEAST_MEMORY, Apart


@dataclass(frozen=True)
class Document:
    """One text to tokenise."""

    key: str
    """Decides whether the document is held out; documents that share text should share the key. "" for a long text that
    is its own key."""
    text: str
    """"" when it is a `long_text` or `messages`."""
    loss_spans: tuple[tuple[int, int], ...] | None = None
    """Half-open character ranges of `text` whose tokens count in the loss; None: all of it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What filters may ask for, such as "language" or "score"; not written."""
    messages: Sequence[Mapping[str, Any]] | None = None
    """Turns of a conversation, each with `role` and `content`; `text` is "" then. The tokenizer's chat template turns
    them into ids, and the assistant's turns alone count in the loss."""
    long_text: LongText | None = None
    """A text that is not held in memory. Gone when the next document is asked for."""

    def is_below(self, share: float, salt: bytes = b"") -> bool:
        """Whether a hash of the key falls into a share of all: the same on every machine and in every order."""
        if self.long_text is not None and not self.key:
            digest = self.long_text.digest(salt)
        else:
            digest = hashlib.sha256(salt + self.key.encode("utf-8", "surrogatepass"))
        return int.from_bytes(digest.digest()[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Unit:
    """What one worker reads alone: a file, or a range of a file that can be entered in the middle. Picklable."""

    path: str
    """A path or fsspec URL."""
    size: int
    """Bytes on disk, for progress and for grouping."""
    start: int = 0
    stop: int | None = None
    """Half-open range in what the format counts (bytes of a plain line file, row groups of a parquet file, rows of an
    MDS shard); None: to the end. Two units of a file never give the same document, all of them give every one."""
    stamp: str = ""
    """Changes when the file does (modification time, etag): a unit that was read from another file is read again."""


@dataclass(frozen=True)
class Fault:
    """Something that could not be read: counted and written down, and the run goes on."""

    path: str
    where: str
    """Place in the file: "line 12", "byte 1034", "row 7"."""
    reason: str
    ends_unit: bool = False
    """Nothing after it could be read either, such as after the cut of a truncated file."""


Report = Callable[[Fault], None]


class SourceBase(BaseModel):
    """Fields of every source; its own fields and `units` and `read` come with each kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Output files are called this."""
    filters: DocumentFilters = DocumentFilters()
    """What this source sets here stands in for the recipe's filters."""
    max_document_memory: Annotated[int, Field(ge=LEAST_MEMORY)] = DOCUMENT_MEMORY
    """Bytes of memory that a document may take where it must be held in one piece, such as a conversation: larger ones
    are faults. Texts are not held."""
    _scratch: Path | None = PrivateAttr(default=None)

    def with_scratch(self, folder: Path | None) -> Self:
        """The same source, which keeps long texts in temporary files of a folder instead of in memory."""
        copy = self.model_copy()
        copy._scratch = folder
        return copy

    def apart(self, column: str | None) -> Apart | None:
        """How rows are read whose text is in a column; None: they hold no text that could be kept in a file."""
        return None if self._scratch is None else Apart(column, self._scratch, self.max_document_memory)


class Source(Protocol):
    name: str
    filters: DocumentFilters

    def units(self, target_bytes: int) -> list[Unit]:
        """All units in an order that never changes, each of about `target_bytes` where the format can be split.

        Raises DataError before any work for what makes the source unusable: nothing there, a missing part, a subset
        that holds metadata only, a column that does not exist.
        """

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        """The documents of one unit, in order. A bad record goes to `report` and is passed over."""
