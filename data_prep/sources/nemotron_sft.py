"""Nemotron-Pretraining-SFT-v1: question and answer flattened into `text`, each folder in a way of its own."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from data_prep.formats.files import File
from data_prep.long_text import LongText
from data_prep.memory import CONVERSATION, check_size
from data_prep.sources.base import Document
from data_prep.sources.chat_rows import Messages, checked
from data_prep.sources.tabular import TextTable, text_of
from ouro_megatron.errors import DataError

_MARK = re.compile(r"<extra_id_[01]>(System|User|Assistant)\n")
_MATH = re.compile(r"\A\s*input:\s*(?P<question>.*?)\s*\n?\s*output:\s*(?P<answer>.*)\Z", re.S | re.I)
_THINK = "\n\n<think>"


class NemotronSft(TextTable):
    """One folder of the corpus. `roles` recovers the turns; a text they cannot be found in stays plain text.

    With `roles` a text that is too long for a conversation (`max_document_memory`) is a fault, whatever is in it.
    """

    pattern: str = "**/*.parquet"
    roles: bool = True
    """Give conversations, of which the answers are learned; off: the flattened text as it is, all of it learned."""

    fallback_keys: ClassVar[tuple[str, ...]] = ("id",)
    folder: ClassVar[str]

    def files(self) -> list[File]:
        """Of the whole corpus's folder, this kind's own part alone."""
        found = super().files()
        own = [file for file in found if f"/{self.folder}/" in file.path]
        if not own and any("/Nemotron-SFT-" in file.path for file in found):
            raise DataError(
                f"source {self.name}: no parquet file in a folder {self.folder} below {self.path}; download it"
            )
        return own or found

    def document(self, row: dict[str, Any], keys: Sequence[str]) -> Document:
        if self.roles:
            messages = self.turns(self._held(row))
            if messages is not None:
                row.pop(self.text)
                key = next((str(row[name]) for name in keys if row.get(name) not in (None, "")), messages[0]["content"])
                return Document(key, "", fields=row, messages=messages)
        return super().document(row, keys)

    def _held(self, row: Mapping[str, Any]) -> str:
        """The whole text. Raises TooLargeError when it is too long for a conversation."""
        text = row.get(self.text)
        if not isinstance(text, LongText):
            return text_of(row, self.text)
        check_size("a conversation", text.size, CONVERSATION, self.max_document_memory)
        return text.whole()

    @abstractmethod
    def turns(self, text: str) -> Messages | None:
        """The conversation in a flattened text; None when it has another form. Raises ValueError when it is broken."""


class NemotronSftGeneral(NemotronSft):
    """Nemotron-SFT-General: turns marked <extra_id_1>User and <extra_id_1>Assistant, which no other tokenizer knows."""

    kind: Literal["nemotron_sft_general"]
    folder: ClassVar[str] = "Nemotron-SFT-General"

    def turns(self, text: str) -> Messages | None:
        """Marks count at the beginning of a line; what comes before the first is the system's."""
        marks = [mark for mark in _MARK.finditer(text) if mark.start() == 0 or text[mark.start() - 1] == "\n"]
        if not any(mark[1] == "Assistant" for mark in marks):
            return None
        before = text[: marks[0].start()].strip()
        turns = [{"role": "system", "content": before}] if before else []
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        for mark, end in zip(marks, ends, strict=True):
            content = text[mark.end() : end].strip("\n")
            if mark[1] != "System" or content.strip():
                turns.append({"role": mark[1].lower(), "content": content})
        return checked(turns)


class NemotronSftCode(NemotronSft):
    """Nemotron-SFT-Code: a prompt, an empty line, and an answer that begins with <think>. Plain text unless asked."""

    kind: Literal["nemotron_sft_code"]
    roles: bool = False
    folder: ClassVar[str] = "Nemotron-SFT-Code"

    def turns(self, text: str) -> Messages | None:
        question, mark, answer = text.partition(_THINK)
        if not mark or not question.strip():
            return None
        return [{"role": "user", "content": question}, {"role": "assistant", "content": f"<think>{answer}"}]


class NemotronSftMath(NemotronSft):
    """Nemotron-SFT-MATH, texts that begin with `input:`. Not part of Ouro's recipe. Plain text unless asked."""

    kind: Literal["nemotron_sft_math"]
    roles: bool = False
    folder: ClassVar[str] = "Nemotron-SFT-MATH"

    def turns(self, text: str) -> Messages | None:
        match = _MATH.match(text)
        if match is None or not match["question"].strip() or not match["answer"].strip():
            return None
        return [{"role": "user", "content": match["question"]}, {"role": "assistant", "content": match["answer"]}]
