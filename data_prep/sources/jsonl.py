"""JSON lines, plain or compressed: one object a line, its text in one field."""

from typing import Literal

from data_prep.formats.rows import JSON_FILES
from data_prep.sources.tabular import TextTable


class JsonLines(TextTable):
    """JSON lines: plain, .gz, .zst, .zstd, .xz or .bz2. A plain file is cut into ranges that are read side by side."""

    kind: Literal["jsonl"]
    pattern: str = JSON_FILES
