"""What of a document is kept out of memory, and how much memory it may take where it must be there in one piece."""

from dataclasses import dataclass
from pathlib import Path

DOCUMENT_MEMORY = 1_000_000_000
"""Bytes one document may take when nothing else is said."""

LEAST_MEMORY = 150_000_000
"""A batch of 1 MB of ordinary text takes 110 MB of it where `tokenizers` does the work."""

# Bytes of memory for each byte: the first three were measured (docs/results/data.md), HELD is an estimate from above.
CONVERSATION = 16
"""Its turns, twice what the template makes of them, ids. Half of that in plain ASCII, but with one emoji in it Python
holds four bytes for each character."""
UNCUT = 130
"""A text that goes to `tokenizers` as a whole."""
PAGE = 4
"""A parquet page that pyarrow unpacks, with a dictionary."""
HELD = 8
"""A value that is read as a string: as bytes, decoded, and parsed."""


class TooLargeError(ValueError):
    """What must be held in one piece needs more memory than `max_document_memory`."""


@dataclass(frozen=True)
class Apart:
    """How rows are read where long ones must not fill the memory."""

    column: str | None
    """Its long values go to files; None: everything is held."""
    folder: Path
    """Takes the temporary files."""
    memory: int = DOCUMENT_MEMORY
    """Bytes that what is held of a row may take."""


def check_size(what: str, size: int, each: int, memory: int) -> None:
    """Raises TooLargeError when `size` bytes, each of which takes `each` bytes of memory, are too many."""
    if size * each > memory:
        raise TooLargeError(
            f"{what} of {size / 1e6:,.1f} MB must be held in one piece and takes about {size * each / 1e6:,.0f} MB of "
            f"memory; max_document_memory allows {memory / 1e6:,.0f} MB"
        )
