"""MegaMath: web pages, and the parts that together give its high-quality share."""

from typing import ClassVar, Literal

from pydantic import Field

from data_prep.formats.files import File
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError

_CODE = "megamath-code holds metadata only, no text: use megamath-text-code-block or megamath-translated-code."
_FIELDS = ("lang", "lang_score", "math_score", "finemath_score")
Subset = Literal["megamath-web-pro", "megamath-text-code-block", "megamath-translated-code", "megamath-qa"]
HIGH_QUALITY: tuple[Subset, ...] = ("megamath-web-pro", "megamath-text-code-block")


class MegaMathWeb(TextTable):
    """megamath-web: parquet, a folder for each crawl; columns differ between files."""

    kind: Literal["megamath_web"]
    pattern: str = "**/*.parquet"
    fields: tuple[str, ...] = _FIELDS

    fallback_keys: ClassVar[tuple[str, ...]] = ("url",)
    metadata_only: ClassVar[str] = _CODE

    def files(self) -> list[File]:
        """Of the whole corpus's folder, the part megamath-web alone."""
        found = super().files()
        web = [file for file in found if "/megamath-web/" in file.path]
        if not web and any("/megamath-" in file.path for file in found):
            raise DataError(
                f"source {self.name}: no parquet file in a folder megamath-web below {self.path}; download it"
            )
        return web or found


class MegaMathHighQuality(TextTable):
    """The high-quality share of MegaMath: rewritten pages (web-pro) and text-code blocks, unless told otherwise."""

    kind: Literal["megamath_hq"]
    pattern: str = "**/*.parquet"
    subsets: tuple[Subset, ...] = Field(default=HIGH_QUALITY, min_length=1)
    """Folders below `path`."""
    fields: tuple[str, ...] = _FIELDS

    fallback_keys: ClassVar[tuple[str, ...]] = ("url",)
    metadata_only: ClassVar[str] = _CODE

    def files(self) -> list[File]:
        found = super().files()
        chosen = [file for file in found if any(f"/{subset}/" in file.path for subset in self.subsets)]
        for subset in self.subsets:
            if not any(f"/{subset}/" in file.path for file in chosen):
                raise DataError(
                    f"source {self.name}: no parquet file in a folder {subset} below {self.path}; download it, or "
                    "choose others with `subsets`"
                )
        return chosen
