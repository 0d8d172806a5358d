"""Filters of single documents and the search for texts of tests, against a plain search."""

import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_prep.filters import Decontamination, DocumentFilters, NgramList, words
from data_prep.sources.base import Document
from ouro_megatron.errors import DataError


def document(text: str = "x" * 10, **fields: object) -> Document:
    return Document("k", text, fields=fields)


@pytest.mark.parametrize(
    ("settings", "given", "reason"),
    [
        ({"min_characters": 11}, document(), "short"),
        ({"min_characters": 10}, document(), None),
        ({"max_characters": 9}, document(), "long"),
        ({"max_characters": 10}, document(), None),
        ({"languages": ("en", "eng")}, document(language="eng"), None),
        ({"languages": ("en",)}, document(language="de"), "language"),
        ({"languages": ("en",)}, document(), "no_language"),
        ({"languages": ("en",), "language_field": "lang"}, document(lang="en"), None),
        ({"min_score": 0.5}, document(score=0.5), None),
        ({"min_score": 0.5}, document(score=0.4), "score"),
        ({"max_score": 0.5}, document(score=1), "score"),
        ({"min_score": 0.5}, document(), "no_score"),
        ({"min_score": 0.5}, document(score="high"), "no_score"),
        ({"min_score": 0.5}, document(score=float("nan")), "no_score"),
        ({"min_score": 0.5}, document(score=True), "no_score"),
        ({"min_score": 2, "score_field": "q"}, document(q=3, score=0), None),
    ],
)
def test_reasons(settings: dict, given: Document, reason: str | None) -> None:
    assert DocumentFilters(**settings).reason(given) == reason


def test_length_of_a_conversation_is_that_of_its_turns() -> None:
    talk = Document("k", "", messages=[{"role": "user", "content": "12345"}, {"role": "assistant", "content": "678"}])
    assert DocumentFilters(min_characters=9).reason(talk) is None
    assert DocumentFilters(min_characters=10).reason(talk) == "short"


def test_a_source_s_own_filters_go_before_the_recipe_s() -> None:
    recipe = DocumentFilters(min_characters=5, min_score=1.0)
    both = DocumentFilters(min_score=None, max_characters=50).over(recipe)
    assert (both.min_characters, both.min_score, both.max_characters) == (5, None, 50)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather was fine, and the train left the station at noon.", "en"),
        ("Das Wetter war schön, und der Zug verließ mittags den Bahnhof.", "de"),
        ("今天天气很好，火车中午离开了车站。", "zh"),
    ],
)
def test_language_told_from_the_text(text: str, language: str) -> None:
    for wanted in ("en", "de", "zh"):
        found = DocumentFilters(languages=(wanted,), detect_language=True).reason(document(text, language="xx"))
        assert found == (None if wanted == language else "language")
    with pytest.raises(ValidationError, match="asks for languages"):
        DocumentFilters(detect_language=True)


def test_ranges_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_characters 9 is above max_characters 3"):
        DocumentFilters(min_characters=9, max_characters=3)


def test_words() -> None:
    assert words("Hello, WORLD! 你好 x2 カナ") == ["hello", "world", "你", "好", "x2", "カ", "ナ"]


def test_ngrams_equal_a_plain_search(tmp_path: Path) -> None:
    generator = random.Random(5)
    vocabulary = [f"w{number}" for number in range(7)]
    banned = [" ".join(generator.choices(vocabulary, k=generator.randrange(1, 9))) for _ in range(12)]
    file = tmp_path / "test.txt"
    file.write_text("\n".join(banned) + "\nw0 w1 w2\n")
    ngrams = NgramList(Decontamination(files=(file,), ngram=3))
    found = []
    for _ in range(600):
        text = " ".join(generator.choices([*vocabulary, "other"], k=generator.randrange(0, 14)))
        runs = [
            " ".join(item.split()[start : start + 3])
            for item in [*banned, "w0 w1 w2"]
            for start in range(len(item.split()) - 2)
        ]
        expected = any(f" {piece} " in f" {text} " for piece in runs)
        assert ngrams.occurs_in(Document("k", text.upper())) == expected, text
        found.append(expected)
    assert 50 < sum(found) < 550


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    short, odd = tmp_path / "short.txt", tmp_path / "odd.jsonl"
    short.write_text("only four words here\n")
    odd.write_text('{"text": "' + "a " * 20 + '"}\n{"answer": 5}\n')
    with pytest.raises(DataError, match=r"short\.txt holds no text of 13 words"):
        NgramList(Decontamination(files=(short,)))
    with pytest.raises(DataError, match=r"odd\.jsonl, line 2: none of the fields"):
        NgramList(Decontamination(files=(odd,)))
    with pytest.raises(DataError, match="nowhere"):
        NgramList(Decontamination(files=(tmp_path / "nowhere",)))
