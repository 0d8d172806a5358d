"""What leaves documents out: length, language, quality score, text that tests are made of. Each works on one document.

Exact duplicates are found across units and sources when everything is read; see data_prep/dedup.py.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.memory import DOCUMENT_MEMORY, check_size
from ouro_megatron.errors import DataError

if TYPE_CHECKING:
    from data_prep.sources.base import Document

_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W぀-ヿ㐀-鿿豈-﫿]+")
"""A word of an alphabet, or one Chinese or Japanese character."""
_SPACES = (" ", "\n", "\u3000", "。", "，")
"""Never part of a word, nor of what decides how a letter is lowered."""
_WORD_MEMORY = 16
"""Bytes of memory for each character of a word: itself, lowered, and what is found in it."""
_DETECTED_CHARACTERS = 1000
"""Text that a language is told from: more takes longer and hardly changes the answer."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DocumentFilters(_Settings):
    """Filters that look at one document and its fields; a source's own ones stand in for the recipe's."""

    min_characters: Annotated[int | None, Field(ge=1)] = None
    max_characters: Annotated[int | None, Field(ge=1)] = None
    languages: tuple[str, ...] | None = None
    """Values of `language_field` that stay. A document without that field is left out."""
    language_field: str = "language"
    detect_language: bool = False
    """The text decides instead of a field: `languages` are ISO 639-1 codes then ("en", "zh")."""
    min_score: float | None = None
    """Least value of `score_field`. A document without that field is left out."""
    max_score: float | None = None
    score_field: str = "score"

    @model_validator(mode="after")
    def _ranges(self) -> "DocumentFilters":
        for low, high in (("min_characters", "max_characters"), ("min_score", "max_score")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is above {high} {most}: nothing would be left")
        if self.detect_language and self.languages is None:
            raise ValueError("detect_language asks for languages, such as [en]")
        return self

    def over(self, recipe: "DocumentFilters") -> "DocumentFilters":
        """These, and the recipe's where these say nothing."""
        names = DocumentFilters.model_fields.keys()
        values = {name: getattr(self if name in self.model_fields_set else recipe, name) for name in names}
        return DocumentFilters(**values)

    def reason(self, document: "Document") -> str | None:
        """Why the document is left out, as a word to count by; None when it stays."""
        if self.min_characters is not None or self.max_characters is not None:
            long = document.long_text
            length = len(text_of(document)) if long is None else long.characters
            if self.min_characters is not None and length < self.min_characters:
                return "short"
            if self.max_characters is not None and length > self.max_characters:
                return "long"
        return self._language_reason(document) or self._score_reason(document)

    def _language_reason(self, document: "Document") -> str | None:
        if self.languages is None:
            return None
        if self.detect_language:
            long = document.long_text
            beginning = text_of(document) if long is None else long.beginning(_DETECTED_CHARACTERS)
            return None if language_of(beginning) in self.languages else "language"
        if self.language_field not in document.fields:
            return "no_language"
        return None if document.fields[self.language_field] in self.languages else "language"

    def _score_reason(self, document: "Document") -> str | None:
        if self.min_score is None and self.max_score is None:
            return None
        score = document.fields.get(self.score_field)
        if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
            return "no_score"
        low = self.min_score is not None and score < self.min_score
        high = self.max_score is not None and score > self.max_score
        return "score" if low or high else None


class Decontamination(_Settings):
    """Leaves out documents that share a run of `ngram` words with a list of texts, such as the questions of a test."""

    files: Annotated[tuple[Path, ...], Field(min_length=1)]
    """.txt: one text a line; .jsonl: the string fields named in `fields`."""
    fields: tuple[str, ...] = ("text", "question", "prompt", "input", "problem")
    ngram: Annotated[int, Field(ge=2)] = 13
    """Words, lower case, without punctuation; a Chinese or Japanese character is a word. Shorter texts never match."""


class Filters(DocumentFilters):
    """All filters of a recipe."""

    exact_dedup: bool = False
    """Only the first of documents with the same text stays, in the order of the recipe's sources."""
    decontaminate: Decontamination | None = None


def text_of(document: "Document") -> str:
    """The text, or that of all turns; not of a long text."""
    if document.messages is None:
        return document.text
    return "\n".join(str(message.get("content") or "") for message in document.messages)


def language_of(text: str) -> str:
    """ISO 639-1 code of the language that the first 1,000 characters are most likely in (a model of py3langid).

    Raises DataError when py3langid is not installed.
    """
    return str(_identifier().classify(text[:_DETECTED_CHARACTERS])[0])


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("filters.detect_language needs py3langid: install ouro-megatron[data]") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def whole_words(pieces: Iterator[str], memory: int = DOCUMENT_MEMORY) -> Iterator[str]:
    """A text in other pieces, cut at white space alone: no word is cut, and how it is lowered sees all it asks for.

    Raises TooLargeError when what has no white space takes more than `memory` bytes.
    """
    held: list[str] = []
    for piece in pieces:
        at = max(piece.rfind(space) for space in _SPACES) + 1
        if at == 0:
            held.append(piece)
            check_size("a text without white space under `decontaminate`", sum(map(len, held)), _WORD_MEMORY, memory)
            continue
        yield "".join((*held, piece[:at]))
        held = [piece[at:]]
    yield "".join(held)


class NgramList:
    """Runs of words that must not occur."""

    def __init__(self, settings: Decontamination) -> None:
        """Raises DataError for a file that cannot be read or that gives no run of the length."""
        self.ngram = settings.ngram
        self._ids: dict[str, int] = {}
        self._runs: set[tuple[int, ...]] = set()
        for file in settings.files:
            longest = 0
            for text in _texts(file, settings.fields):
                ids = [self._ids.setdefault(word, len(self._ids)) for word in words(text)]
                longest = max(longest, len(ids))
                self._runs.update(zip(*(ids[start:] for start in range(self.ngram)), strict=False))
            if longest < self.ngram:
                raise DataError(f"filters.decontaminate: {file} holds no text of {self.ngram} words or more")

    def __len__(self) -> int:
        return len(self._runs)

    @cached_property
    def _hashes(self) -> np.ndarray:
        rows = np.array(sorted(self._runs), dtype=np.int64)
        return np.unique(_row_hashes(rows.ravel(), self.ngram)[:: self.ngram])

    def occurs_in(self, document: "Document", memory: int = DOCUMENT_MEMORY) -> bool:
        """Whether any run occurs in a document's text. Raises TooLargeError as `whole_words` does."""
        if document.long_text is None:
            return self._occur(self._ids_of(text_of(document)))
        held = np.zeros(0, dtype=np.int64)
        for piece in whole_words(document.long_text.pieces(), memory):
            held = np.concatenate((held[-self.ngram + 1 :], self._ids_of(piece)))
            if self._occur(held):
                return True
        return False

    def _ids_of(self, text: str) -> np.ndarray:
        get = self._ids.get
        return np.array([get(word, -1) for word in words(text)], dtype=np.int64)

    def _occur(self, ids: np.ndarray) -> bool:
        """Candidates are found by a hash of all windows at one time, then compared."""
        if len(ids) < self.ngram:
            return False
        known = ids >= 0
        if int(known.sum()) < self.ngram:
            return False
        # Windows with an unknown word cannot match.
        unknown = np.concatenate(([0], np.cumsum(~known)))
        whole = unknown[self.ngram :] == unknown[: -self.ngram]
        candidates = np.flatnonzero(whole)
        if not len(candidates):
            return False
        hit = np.isin(_row_hashes(ids, self.ngram)[candidates], self._hashes)
        return any(tuple(ids[at : at + self.ngram].tolist()) in self._runs for at in candidates[hit].tolist())


def _row_hashes(ids: np.ndarray, ngram: int) -> np.ndarray:
    """A hash of each window of `ngram` ids: uint64[len(ids) - ngram + 1]."""
    values = ids.astype(np.uint64) + np.uint64(1)
    out = np.zeros(len(ids) - ngram + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for shift in range(ngram):
            out = out * np.uint64(0x9E3779B97F4A7C15) + values[shift : len(ids) - ngram + 1 + shift]
    return out


def _texts(file: Path, fields: Sequence[str]) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if file.suffix != ".jsonl":
                    yield line
                elif line.strip():
                    yield from _strings(file, number, line, fields)
    except OSError as error:
        raise DataError(f"filters.decontaminate: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"filters.decontaminate: {file} is not UTF-8: {error}") from error


def _strings(file: Path, number: int, line: str, fields: Sequence[str]) -> Iterator[str]:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"filters.decontaminate: {file}, line {number}: {error}") from error
    found = (
        [record[name] for name in fields if isinstance(record.get(name), str)] if isinstance(record, Mapping) else []
    )
    if not found:
        raise DataError(f"filters.decontaminate: {file}, line {number}: none of the fields {', '.join(fields)} is text")
    yield from found
