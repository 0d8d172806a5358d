"""Any dataset that the `datasets` library opens: on the Hub by its id, a local folder, or one saved to disk."""

from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_prep.formats.compression import Damaged, bare_name, codec_of_bytes, inflate
from data_prep.formats.files import File, find_files, is_url, open_file, pieces
from data_prep.formats.remote_errors import describe, explain, is_of_the_network
from data_prep.formats.rows import format_of
from data_prep.formats.tables import Row, rows_in
from data_prep.memory import Apart
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.chat_rows import key_of, list_of, messages_of, pair_of
from data_prep.sources.tabular import TextTable
from ouro_megatron.errors import DataError

_ROWS = 1000
"""Rows taken at one time from a dataset on disk, where their text stays."""
_STREAMED_ROWS = 100
_OF_THE_LIBRARY = {"columns": None, "encoding": "utf-8", "features": None, "field": None, "filters": None}
"""Settings of a dataset's card that only the library follows, and what they are where the card says nothing."""
_LINES = (".jsonl", ".ndjson")
"""Files of these names hold an object a line; .json may be one array."""


class HuggingFaceDataset(TextTable):
    """A dataset by its Hub id, or a folder: one of data files, or one that `save_to_disk` made.

    Data files in parquet, Arrow or JSON lines are read as those of the kinds `parquet`, `arrow` and `jsonl` are: in
    ranges, and without holding a long text. What else the library knows is streamed by it: a unit is then a shard as it
    counts them.
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

    fallback_keys: ClassVar[tuple[str, ...]] = ("url", "id")

    def units(self, target_bytes: int) -> list[Unit]:
        if self._saved():
            saved = self._load_saved()
            self._check(saved.column_names)
            return self._row_ranges(saved, target_bytes)
        revision = self._commit()
        builder = self._builder(revision)
        files = self._data_files(builder)
        if files is not None and self._hold_text(files):
            return self.units_of(files, target_bytes)
        streamed = self._streamed(builder)
        self._check(list(streamed.column_names or next(iter(streamed), {})))
        # What a shard weighs is known for some datasets only; otherwise each counts as a unit of the wanted size.
        size = (streamed.info.download_size or 0) // streamed.num_shards or target_bytes
        return [Unit(self.path, size, index, index + 1, revision or "") for index in range(streamed.num_shards)]

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
        except ImportError:  # `_library` names what is missing
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

    def _load_saved(self) -> Any:
        library = _library()
        try:
            found = library.load_from_disk(self.path, storage_options=dict(self.storage_options) or None)
            return found[self.split] if isinstance(found, library.DatasetDict) else found
        except Exception as error:  # the library raises many kinds
            raise self._cannot_open(error) from error

    def _builder(self, revision: str | None) -> Any:
        """What knows the dataset's files. Raises DataError when the library is missing or cannot open it."""
        library = _library()
        try:
            return library.load_dataset_builder(self.path, self.config, revision=revision)
        except Exception as error:  # the library and the Hub client raise many kinds
            raise self._cannot_open(error) from error

    def _streamed(self, builder: Any) -> Any:
        try:
            return builder.as_streaming_dataset(split=self.split)
        except Exception as error:  # as above
            raise self._cannot_open(error) from error

    def _data_files(self, builder: Any) -> list[File] | None:
        """The split's files, when our readers give the rows that the library would; None when it must read them."""
        module, config = type(builder).__module__.rpartition(".")[2], builder.config
        paths = [str(path) for path in (config.data_files or {}).get(self.split, ())]
        if any(getattr(config, name, None) not in (None, default) for name, default in _OF_THE_LIBRARY.items()):
            return None
        if not paths or not all(_is_read_here(path, module) for path in paths):
            return None
        folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
        listed = [file for folder in folders for file in find_files(self.name, folder, "*", self.storage_options)]
        found = {file.path: file for file in listed}
        if not found.keys() >= set(paths) or (module == "json" and not self._has_lines(paths[0])):
            return None
        return [found[path] for path in paths]

    def _hold_text(self, files: Sequence[File]) -> bool:
        """Whether the text is one in the files too; the library may turn numbers into text, as the card says.

        Raises DataError for columns that do not fit.
        """
        for _, columns in self.sample_columns(files):
            self._check([column.name for column in columns])
            if not self.chat and any(column.name == self.text and not column.is_text for column in columns):
                return False
        return True

    def _has_lines(self, path: str) -> bool:
        """Whether a JSON file begins with no array, which only the library reads as rows."""
        with open_file(path, self.storage_options) as stream:
            head = stream.read(8)
            stream.seek(0)
            codec = codec_of_bytes(head)
            content = pieces(stream, 1 << 16) if codec is None else inflate(stream, codec)
            try:
                first = next((piece for piece in content if piece.strip()), b"")
            except Damaged:  # reading it tells
                return True
        return not first.removeprefix(BOM_UTF8).lstrip().startswith(b"[")

    def apart(self, column: str | None) -> Apart | None:
        return super().apart(None if self.chat else column)

    @property
    def wanted(self) -> tuple[str, ...]:
        """All: filters may ask for any, as of what the library reads."""
        return ()

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        if unit.path != self.path:
            yield from super().read(unit, report)
            return

        def report_here(fault: Fault) -> None:
            report(fault if self._saved() else replace(fault, where=f"shard {unit.start}, {fault.where}"))

        yield from self.documents_of(self._library_rows(unit, report_here), unit, report_here)

    def _library_rows(self, unit: Unit, report: Report) -> Iterator[Row]:
        number = unit.start if self._saved() else 0
        try:
            for table in self._tables(unit):
                for batch in table.to_batches():
                    yield from rows_in(unit.path, batch, number, report, self.apart(self.text))
                    number += batch.num_rows
        except DataError:
            raise
        except Exception as error:  # what a broken file raises depends on the builder that reads it
            if self._on_hub and is_of_the_network(error):  # no fault of the file, so nothing of it may be left out
                where = f"{unit.path}, shard {unit.start}, row {number}"
                raise DataError(f"{where}: {explain(f'hf://datasets/{self.path}', error)}") from error
            report(Fault(unit.path, f"row {number}", describe(error), ends_unit=True))

    def _tables(self, unit: Unit) -> Iterator[Any]:
        """pyarrow's tables, one after the other."""
        if not self._saved():
            streamed = self._streamed(self._builder(unit.stamp or self.revision)).with_format("arrow")
            yield from streamed.shard(num_shards=streamed.num_shards, index=unit.start).iter(batch_size=_STREAMED_ROWS)
            return
        dataset = self._load_saved().with_format("arrow")
        stop = len(dataset) if unit.stop is None else unit.stop
        for start in range(unit.start, stop, _ROWS):
            yield dataset[start : min(start + _ROWS, stop)]

    def document(self, row: dict[str, Any], keys: Sequence[str]) -> Document:
        if not self.chat:
            return super().document(row, keys)
        messages = messages_of(row)
        return Document(key_of(messages), "", messages=messages)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'kind: datasets needs the library `datasets`; install it with: pip install "ouro-megatron[data]"'
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _is_read_here(path: str, module: str) -> bool:
    """Whether a file that this module of the library's would read is one of ours."""
    kind = format_of(path)
    if is_url(path) and not path.startswith("hf://"):
        return False
    return module == kind and (kind != "json" or bare_name(path).endswith(_LINES))
