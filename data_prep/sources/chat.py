"""Any chat set: rows that hold a conversation, in one of the common layouts."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from data_prep.formats.compression import bare_name
from data_prep.formats.files import File
from data_prep.formats.rows import read_rows
from data_prep.sources.base import Document, Fault, Report, Unit
from data_prep.sources.chat_rows import PAIRS, Layout, Messages, key_of, list_of, messages_of, pair_of
from data_prep.sources.tabular import FileSource, is_taken
from ouro_megatron.errors import DataError

_NOT_ROWS = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "README.json"}


class ChatSource(FileSource):
    """Rows with a conversation each; the tokenizer's chat template writes them, the assistant's turns are learned.

    A conversation is held out by its first question, so all answers to a question stay together.
    """

    pattern: str = "**/*.{jsonl,json,parquet,arrow,jsonl.gz,json.gz,jsonl.zst,jsonl.xz}"
    layout: Layout = "auto"
    """messages ({role, content}), conversations ({from, value}), pair (a question and an answer column), or auto."""
    question: str | None = None
    """Column of the question, for `pair`."""
    answer: str | None = None
    """Column of the answer, for `pair`."""

    about: ClassVar[str] = ""
    """What to say when the columns do not fit."""

    @property
    def pair(self) -> tuple[str, str] | None:
        if (self.question is None) != (self.answer is None):
            raise DataError(f"source {self.name}: give both `question` and `answer`, or neither")
        return (self.question, self.answer) if self.question and self.answer else None

    def files(self) -> list[File]:
        found = [file for file in super().files() if file.name not in _NOT_ROWS]
        if not found:
            raise DataError(f"source {self.name}: no file with rows below {self.path}")
        self._check_doubled(found)
        return found

    def _check_doubled(self, files: Sequence[File]) -> None:
        """Some sets lie in one folder twice, as JSON lines and as parquet."""
        if self.partial:
            return
        seen: dict[tuple[str, str], File] = {}
        for file in files:
            stem, _, suffix = bare_name(file.path).rpartition(".")
            other = seen.setdefault((file.folder, stem), file)
            if other is not file and bare_name(other.path).rpartition(".")[2] != suffix:
                raise DataError(
                    f"source {self.name}: {other.path} and {file.path}: the same rows twice? Choose one kind with "
                    "`pattern`, or set `partial: true` to take both"
                )

    def units(self, target_bytes: int) -> list[Unit]:
        files, pair = self.files(), self.pair
        for file, columns in self.sample_columns(files):
            names = [column.name for column in columns]
            fits = set(names).issuperset(pair) if pair else self._fits(names)
            if not fits:
                pairs = ", ".join(f"{question}+{answer}" for question, answer in PAIRS)
                raise DataError(
                    f"source {self.name}: {file.path} has the columns {', '.join(names)}: no conversation. Known are a "
                    f"list in messages or conversations, and {pairs}; or name `question` and `answer`. {self.about}"
                )
        return self.units_of(files, target_bytes)

    def _fits(self, names: Sequence[str]) -> bool:
        if self.layout != "pair" and list_of(names, self.layout) is not None:
            return True
        return self.layout in ("auto", "pair") and pair_of(names) is not None

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        for where, row in read_rows(unit, (), report, self.storage_options, self.apart(None)):
            if not self.is_kept(row):
                continue
            try:
                document = self.document(row)
            except (ValueError, RecursionError) as error:
                report(Fault(unit.path, where, str(error)))
                continue
            if is_taken(document, self.take):
                yield document

    def document(self, row: dict[str, Any]) -> Document:
        """Raises ValueError when the row holds no conversation."""
        messages = self.messages(row)
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float | bool) or _short(value)}
        return Document(key_of(messages), "", fields=scalars, messages=messages)

    def messages(self, row: dict[str, Any]) -> Messages:
        return messages_of(row, self.layout, self.pair)


def _short(value: Any) -> bool:
    """Names and labels, which filters ask for; not the conversation itself."""
    return isinstance(value, str) and len(value) <= 200


class ChatTable(ChatSource):
    """Conversations in JSON lines, parquet or Arrow, in any of the common layouts."""

    kind: Literal["chat"]
