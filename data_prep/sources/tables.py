"""Any parquet or Arrow files with the text in one column."""

from typing import Literal

from data_prep.sources.tabular import TextTable


class ParquetTable(TextTable):
    """Parquet files with the text in one column."""

    kind: Literal["parquet"]
    pattern: str = "**/*.parquet"


class ArrowTable(TextTable):
    """Arrow files, stream or file format, such as `datasets` saves to disk."""

    kind: Literal["arrow"]
    pattern: str = "**/*.arrow"
