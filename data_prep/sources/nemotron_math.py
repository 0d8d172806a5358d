"""Nemotron-CC-Math-v1: parquet in the folders 3, 4plus and 4plus_MIND."""

from typing import ClassVar, Literal

from pydantic import Field

from data_prep.formats.files import File
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError


class NemotronCCMath(TextTable):
    """Nemotron-CC-Math-v1. The folder `3` holds quality 3 alone: "3plus" is `3` and `4plus` together."""

    kind: Literal["nemotron_cc_math"]
    pattern: str = "**/{3,4plus,4plus_MIND}/*.parquet"
    subsets: tuple[Literal["3", "4plus", "4plus_MIND"], ...] = Field(default=("3", "4plus", "4plus_MIND"), min_length=1)
    """Folders to use; 4plus_MIND is 4plus rephrased as conversations."""

    fallback_keys: ClassVar[tuple[str, ...]] = ("id",)

    def files(self) -> list[File]:
        found = [file for file in super().files() if file.folder.rsplit("/", 1)[-1] in self.subsets]
        present = {file.folder.rsplit("/", 1)[-1] for file in found}
        if absent := [name for name in self.subsets if name not in present]:
            raise DataError(
                f"source {self.name}: no file in a folder {absent[0]} below {self.path}; download it, or choose with "
                "`subsets`"
            )
        return found
