"""Any dataset that the `datasets` library opens: on the Hub by its id, a local folder, or one saved to disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data_prep.formats.remote_errors import describe, explain, is_of_the_network
from data_prep.formats.tables import rows_in
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.chat_rows import key_of, list_of, messages_of, pair_of
from data_prep.sources.tabular import TextTable, is_taken
from ouro_megatron.errors import DataError

_ROWS = 1000
"""Rows taken at one time from a dataset on disk, where their text stays."""
_STREAMED_ROWS = 100


class HuggingFaceDataset(TextTable):
    """A dataset by its Hub id, or a folder: one of data files, or one that `save_to_disk` made.

    Rows without the text column that hold a conversation are read as such. Hub datasets are streamed: a unit is a
    shard as the library counts them.
    """

    kind: Literal["datasets"]
    path: str
    """Hub id such as "HuggingFaceFW/fineweb-edu", or a folder."""
    pattern: str = "**/*"
    """Not used: the library finds the files."""
    config: str | None = None
    """Name of the dataset's configuration."""
    split: str = "train"
    """Name of the dataset's split."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset. One run reads one commit: without it the newest, so that a dataset with a
    newer one is made anew."""
    chat: bool = False
    """Rows are conversations."""

    def units(self, target_bytes: int) -> list[Unit]:
        revision = self._commit()
        dataset = self._open(revision)
        names = list(dataset.column_names or next(iter(dataset), {}))
        self._check(names)
        if self._saved():
            return self._row_ranges(dataset, target_bytes)
        # What a shard weighs is known for some datasets only; otherwise each counts as a unit of the wanted size.
        size = (dataset.info.download_size or 0) // dataset.num_shards or target_bytes
        return [Unit(self.path, size, index, index + 1, revision or "") for index in range(dataset.num_shards)]

    def _saved(self) -> bool:
        folder = Path(self.path)
        return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()

    @property
    def _on_hub(self) -> bool:
        return not Path(self.path).exists()

    def _commit(self) -> str | None:
        """The commit that the revision of a Hub dataset is at now. Raises DataError when it cannot be asked for."""
        if not self._on_hub:
            return self.revision
        try:
            from huggingface_hub import HfApi
        except ImportError:  # `_open` names what is missing
            return self.revision
        try:
            return HfApi().dataset_info(self.path, revision=self.revision).sha
        except Exception as error:  # the Hub client raises many kinds
            raise self._cannot_open(error) from error

    def _cannot_open(self, error: Exception) -> DataError:
        what = f"source {self.name}: `datasets` cannot open {self.path!r} (config {self.config}, split {self.split})"
        reason = explain(f"hf://datasets/{self.path}", error) if self._on_hub else describe(error)
        return DataError(
            f"{what}: {reason}. A Hub id needs network access (and a token if it is gated); "
            "a folder must hold data files"
        )

    def _row_ranges(self, dataset: Any, target_bytes: int) -> list[Unit]:
        size = sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files) or dataset.dataset_size or 1
        count = max(1, min(len(dataset), round(size / target_bytes)))
        bounds = [len(dataset) * index // count for index in range(count + 1)]
        stamp = str(dataset._fingerprint)
        return [Unit(self.path, size // count, start, stop, stamp) for start, stop in pairwise(bounds)]

    def _check(self, names: Sequence[str]) -> None:
        if self.chat:
            if list_of(names) is None and pair_of(names) is None:
                raise DataError(f"source {self.name}: {self.path} has the columns {', '.join(names)}: no conversation")
        elif self.text not in names:
            hint = " Set `chat: true` if its rows are conversations." if list_of(names) else ""
            raise DataError(
                f"source {self.name}: {self.path} has no column {self.text!r}, but: {', '.join(names)}.{hint}"
            )

    def _open(self, revision: str | None) -> Any:
        """Raises DataError when the library is missing or cannot open it."""
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                'kind: datasets needs the library `datasets`; install it with: pip install "ouro-megatron[data]"'
            ) from error
        datasets.disable_progress_bars()
        try:
            if self._saved():
                found = datasets.load_from_disk(self.path, storage_options=dict(self.storage_options) or None)
                return found[self.split] if isinstance(found, datasets.DatasetDict) else found
            return datasets.load_dataset(self.path, self.config, split=self.split, revision=revision, streaming=True)
        except Exception as error:  # the library and the Hub client raise many kinds
            raise self._cannot_open(error) from error

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        keys = (self.key,) if self.key is not None else ("url", "id")
        place = "" if self._saved() else f"shard {unit.start}, "

        def report_here(fault: Fault) -> None:
            report(replace(fault, where=place + fault.where))

        number = unit.start if self._saved() else 0
        try:
            for table in self._tables(unit):
                for batch in table.to_batches():
                    for where, row in rows_in(unit.path, batch, number, report_here, self.apart()):
                        if not self.is_kept(row):
                            continue
                        try:
                            document = self._conversation(row) if self.chat else self.document(row, keys)
                        except (ValueError, RecursionError) as error:
                            report_here(Fault(unit.path, where, str(error)))
                            continue
                        if is_taken(document, self.take):
                            yield document
                    number += batch.num_rows
        except DataError:
            raise
        except Exception as error:  # what a broken file raises depends on the builder that reads it
            if self._on_hub and is_of_the_network(error):  # no fault of the file, so nothing of it may be left out
                where = f"{place}row {number}"
                raise DataError(f"{unit.path}, {where}: {explain(f'hf://datasets/{self.path}', error)}") from error
            report_here(Fault(unit.path, f"row {number}", describe(error), ends_unit=True))

    def _tables(self, unit: Unit) -> Iterator[Any]:
        """pyarrow's tables, one after the other."""
        dataset = self._open(unit.stamp or self.revision).with_format("arrow")
        if not self._saved():
            yield from dataset.shard(num_shards=dataset.num_shards, index=unit.start).iter(batch_size=_STREAMED_ROWS)
            return
        stop = len(dataset) if unit.stop is None else unit.stop
        for start in range(unit.start, stop, _ROWS):
            yield dataset[start : min(start + _ROWS, stop)]

    @staticmethod
    def _conversation(row: dict[str, Any]) -> Document:
        messages = messages_of(row)
        return Document(key_of(messages), "", messages=messages)
