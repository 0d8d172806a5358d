"""Ultra-FineWeb, Chinese part: parquet whose text is in `content`."""

from typing import ClassVar, Literal

from data_prep.sources.tabular import TextTable


class UltraFineWebZh(TextTable):
    """Ultra-FineWeb-zh: 256 parquet files; columns content, score, source."""

    kind: Literal["ultra_fineweb_zh"]
    pattern: str = "{,data/}{,ultrafineweb_zh/}ultrafineweb-zh-part-*.parquet"
    text: str = "content"
    fields: tuple[str, ...] = ("score", "source")

    metadata_only: ClassVar[str] = "This looks like another dataset of the same family (L3 has uid, style, content)."
