"""Nemotron-CC as Common Crawl hosts it: quality=Q/kind=K/kind2=K2/*.jsonl.zstd."""

import gzip
import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from data_prep.formats.files import File, open_file
from data_prep.sources.base import Unit
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError

_SYNTHETIC_HIGH = ("distill", "diverse_qa_pairs", "extract_knowledge", "knowledge_list", "wrap_medium")
_FOLDERS = {
    "high/actual": ("high", "actual", "actual"),
    **{f"high/{kind}": ("high", "synthetic", kind) for kind in _SYNTHETIC_HIGH},
    **{
        f"{quality}/actual": (quality, "actual", "actual") for quality in ("medium-high", "medium", "medium-low", "low")
    },
    "low/wrap_medium": ("low", "synthetic", "wrap_medium"),
}
BUCKETS = tuple(_FOLDERS)
_QUALITIES = tuple(dict.fromkeys(folders[0] for folders in _FOLDERS.values()))
_FOLDER = re.compile(r"quality=([^/]+)/kind=([^/]+)/kind2=([^/]+)/[^/]+$")
_NAMES = {folders: bucket for bucket, folders in _FOLDERS.items()}


class NemotronCC(TextTable):
    """Nemotron-CC v1: eleven buckets of quality and kind. Synthetic documents share the key of the page they
    were made from, so that a page and its rephrasings are held out together."""

    kind: Literal["nemotron_cc"]
    pattern: str = "**/quality=*/kind=*/kind2=*/*.jsonl.{zstd,zst}"
    buckets: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default_factory=dict)
    """Buckets to use, each with the share of its documents, such as {high/actual: 1.0, medium: 0.25}. A quality alone
    stands for all of its kinds. Everything that is there when left out."""
    manifest: str | None = None
    """The corpus's own list of files (data-jsonl.paths.gz): each file of the chosen buckets must then be there."""

    fallback_keys: ClassVar[tuple[str, ...]] = ("warc_record_id", "url")

    @field_validator("buckets")
    @classmethod
    def _known(cls, buckets: dict[str, float]) -> dict[str, float]:
        for name in buckets:
            if name not in BUCKETS and name not in _QUALITIES:
                raise ValueError(f"no bucket {name!r}; there are {', '.join(BUCKETS)}, and {', '.join(_QUALITIES)}")
        return buckets

    def weight(self, bucket: str) -> float:
        """Share of a bucket's documents to use; the bucket's own entry goes before its quality's."""
        if not self.buckets:
            return 1.0
        return self.buckets.get(bucket, self.buckets.get(bucket.split("/")[0], 0.0))

    def files(self) -> list[File]:
        found = [file for file in super().files() if self.weight(self._bucket(file.path)) > 0]
        present = {self._bucket(file.path) for file in found}
        for name in self.buckets:
            wanted = [name] if name in BUCKETS else [bucket for bucket in BUCKETS if bucket.startswith(f"{name}/")]
            if not present.intersection(wanted):
                raise DataError(
                    f"source {self.name}: bucket {name} is chosen, but {self.path} has no file of it; there are "
                    f"{', '.join(sorted(present)) or 'none of the chosen ones'}"
                )
        if self.manifest is not None and not self.partial:
            self._check_manifest(found)
        return found

    def _bucket(self, path: str) -> str:
        match = _FOLDER.search(path)
        bucket = _NAMES.get((match[1], match[2], match[3])) if match else None
        if bucket is None:
            raise DataError(f"source {self.name}: {path}: no bucket of Nemotron-CC; there are {', '.join(BUCKETS)}")
        return bucket

    def _check_manifest(self, files: Sequence[File]) -> None:
        assert self.manifest is not None
        with open_file(self.manifest, self.storage_options) as stream:
            content = stream.read()
        try:
            lines = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode().split()
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"source {self.name}: {self.manifest}: cannot be read: {error}") from error
        wanted = {_tail(line) for line in lines if _FOLDER.search(line) and self.weight(self._bucket(line)) > 0}
        if not wanted:
            raise DataError(f"source {self.name}: {self.manifest} names no file of the chosen buckets")
        missing = sorted(wanted - {_tail(file.path) for file in files})
        if missing:
            raise DataError(
                f"source {self.name}: {len(missing)} of {len(wanted)} files of the manifest are not below {self.path}, "
                f"the first is {missing[0]}. Finish the download, or set `partial: true`"
            )

    def share(self, unit: Unit) -> float:
        return self.take * self.weight(self._bucket(unit.path))


def _tail(path: str) -> str:
    """The part of a path that names a file of the corpus, whatever tool wrote its suffix."""
    return "/".join(path.split("/")[-4:]).removesuffix(".zstd").removesuffix(".zst")
