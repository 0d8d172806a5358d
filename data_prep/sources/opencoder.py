"""OpenCoder's corpora: web pages about code and mathematics, and the annealing set, which is Arrow."""

import json
from collections.abc import Sequence
from typing import ClassVar, Literal

from data_prep.formats.files import File, is_url, open_file
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError


class OpenCoderPretrain(TextTable):
    """OpenCoder's pre-training text: opc-fineweb-code-corpus and opc-fineweb-math-corpus, parquet with `text`."""

    kind: Literal["opencoder_pretrain"]
    pattern: str = "**/*.parquet"

    fallback_keys: ClassVar[tuple[str, ...]] = ("url",)
    metadata_only: ClassVar[str] = (
        "RefineCode is published as metadata only (repository, path, licence): fetch the files it points to first, "
        "then read them with kind: jsonl or parquet."
    )


class OpenCoderAnnealing(TextTable):
    """opc-annealing-corpus: Arrow files beside dataset_info.json and state.json, in three folders."""

    kind: Literal["opencoder_annealing"]
    pattern: str = "**/*.arrow"
    subsets: tuple[Literal["algorithmic_corpus", "synthetic_code_snippet", "synthetic_qa"], ...] = ()
    """Folders to use; all when left out."""
    fields: tuple[str, ...] = ("lang",)

    def files(self) -> list[File]:
        found = super().files()
        if self.subsets:
            found = [file for file in found if file.folder.rsplit("/", 1)[-1] in self.subsets]
            present = {file.folder.rsplit("/", 1)[-1] for file in found}
            if absent := [name for name in self.subsets if name not in present]:
                raise DataError(f"source {self.name}: no file in a folder {absent[0]} below {self.path}")
        if not self.partial:
            self._check_state(found)
        return found

    def _check_state(self, files: Sequence[File]) -> None:
        """Each folder's state.json, where there is one, lists the files that belong together."""
        for folder in dict.fromkeys(file.folder for file in files):
            names = self._listed(f"{folder}/state.json")
            missing = sorted(set(names) - {file.name for file in files if file.folder == folder})
            if missing:
                raise DataError(
                    f"source {self.name}: {folder}/state.json names {missing[0]}, which is not there "
                    f"({len(missing)} of {len(names)} files are missing). Finish the download, or set `partial: true`"
                )

    def _listed(self, path: str) -> list[str]:
        if is_url(path):
            return []
        try:
            with open_file(path, self.storage_options) as stream:
                return [entry["filename"] for entry in json.load(stream)["_data_files"]]
        except (DataError, ValueError, KeyError, TypeError):
            return []
