"""Texts in files, in pieces: whole characters, the same words, the same filters."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.filters import Decontamination, NgramList, whole_words, words
from data_prep.long_text import long_text
from data_prep.sources.base import Document

TEXT = "naïve 中文分词很难。 Ὀδυσσεύς ΣΑΣ \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * 40


@given(cuts=st.lists(st.integers(0, len(TEXT.encode())), max_size=12))
def test_a_text_in_any_blocks(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    data = TEXT.encode()
    edges = [0, *sorted(cuts), len(data)]
    text = long_text((data[a:b] for a, b in pairwise(edges)), tmp_path_factory.getbasetemp())
    assert text.whole() == TEXT and text.characters == len(TEXT) and text.size == len(data)
    assert text.beginning(7) == TEXT[:7] and text.beginning(10**6) == TEXT
    text.close()


@pytest.mark.parametrize("at", [0, 1, 700, 701])
@pytest.mark.parametrize("step", [1, 3, 64, 10**6])
def test_where_a_text_is_broken(tmp_path: Path, at: int, step: int) -> None:
    data = ("é" * 1000).encode()
    data = data[:at] + b"\xff" + data[at:]
    with pytest.raises(UnicodeDecodeError) as whole:
        data.decode()
    with pytest.raises(UnicodeDecodeError) as pieces:
        long_text((data[start : start + step] for start in range(0, len(data), step)), tmp_path)
    assert (pieces.value.start, pieces.value.reason) == (whole.value.start, whole.value.reason)


def test_a_text_that_ends_inside_a_character(tmp_path: Path) -> None:
    with pytest.raises(UnicodeDecodeError, match="unexpected end of data") as error:
        long_text([b"abc\xe4", b"\xb8"], tmp_path)
    assert error.value.start == 3


def test_words_of_a_text_in_pieces() -> None:
    choose = random.Random(0)
    text = "".join(choose.choices(["ΣΑΣ", "Σ", " ", "\n", "'", "a", "İ", "中", "。", ".", "ß"], k=5000))
    for size in (1, 2, 7, 64, 10**6):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = list(whole_words(iter(pieces)))
        assert "".join(found) == text
        assert [word for piece in found for word in words(piece)] == words(text)


def test_contaminated_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.txt").write_text("one two three four five six\n")
    ngrams = NgramList(Decontamination(files=(tmp_path / "test.txt",), ngram=5))
    monkeypatch.setattr("data_prep.long_text._BLOCK", 9)
    for text, expected in (
        ("seven eight " * 30 + "two, THREE four\nfive six" + " nine" * 30, True),
        ("seven eight " * 30 + "two, three four five" + " nine" * 30, False),
    ):
        assert ngrams.occurs_in(Document("k", text)) == expected
        assert ngrams.occurs_in(Document("k", "", long_text=long_text([text.encode()], tmp_path))) == expected
