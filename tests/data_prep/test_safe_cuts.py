"""A tokenizer of the slow path that takes a text in parts gives the ids of the whole text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from data_prep import safe_cuts
from data_prep.chat import ChatEncoder
from data_prep.encode import PlainEncoder
from data_prep.long_text import long_text
from data_prep.memory import TooLargeError
from data_prep.safe_cuts import can_be_cut, parts
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.data_prep.test_byte_level import EOD, chain, save, stdlib, trained
from tests.data_prep.test_chat import TALK, TEMPLATES, write_chat_tokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Change = Callable[[Tokenizer], Any]


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), letters])


def pre(value: Any) -> Change:
    return lambda tokenizer: setattr(tokenizer, "pre_tokenizer", value)


def normal(value: Any) -> Change:
    return lambda tokenizer: setattr(tokenizer, "normalizer", value)


def added(content: str, **settings: bool) -> Change:
    return lambda tokenizer: tokenizer.add_tokens([AddedToken(content, normalized=False, **settings)])


CUT: dict[str, list[Change]] = {
    "digits": [],
    "gpt-2": [pre(chain(False))],
    "normal forms": [normal(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))],
    "decomposed": [normal(normalizers.NFD()), pre(split(LLAMA))],
    "llama": [pre(split(LLAMA))],
    "llama, removed": [pre(split(LLAMA, "removed", True))],
    "qwen": [normal(normalizers.NFC()), pre(split(LLAMA.replace("{1,3}", "")))],
    "added": [added("<x>", rstrip=True, lstrip=True), added("ab", single_word=True), added("  ")],
}
WHOLE: dict[str, list[Change]] = {
    "prefix": [pre(pre_tokenizers.ByteLevel(add_prefix_space=True))],
    "no splitter": [pre(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))],
    "words": [pre(pre_tokenizers.Metaspace())],
    "another pattern": [pre(split(r"\w+ \w+"))],
    "digits only": [pre(split(r"\p{N}+"))],
    "after letters": [pre(pre_tokenizers.Sequence([chain(False), pre_tokenizers.Split(Regex(LLAMA), "isolated")]))],
    "prepend": [normal(normalizers.Prepend("_"))],
    "dropout": [lambda tokenizer: setattr(tokenizer.model, "dropout", 0.5)],
    "added across": [added("a b")],
    "added takes space": [added("ab", rstrip=True)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer"), True, stdlib(0, 10))


def changed(base: Path, folder: Path, changes: list[Change]) -> Path:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for change in changes:
        change(tokenizer)
    return save(tokenizer, folder)


@pytest.fixture(scope="module", params=CUT)
def plain(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> PlainEncoder:
    folder = changed(base, tmp_path_factory.mktemp("changed"), CUT[request.param])
    tokenizer = load_tokenizer(folder)
    assert can_be_cut(tokenizer.to_json())
    return PlainEncoder(tokenizer)


ODD = (
    *"abAZ019 \n\t\r,.;:'()!-_<>é中かй각Ⅷ²ﬁ😀，",
    *("\u3099", "\u0301", "\u11a8", "\u00a0", "\u3000", "\u2028"),  # marks that compose, and other white space
    *("  ", "\n\n", "'s", "'LL", "文。", "<x>", "ab", "a b", EOD, "...", "def f(x):\n    return x\n"),
)
odd = st.lists(st.sampled_from(ODD), max_size=40).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=odd)
def test_ids_are_those_of_the_whole(plain: PlainEncoder, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_cuts, "PART", 0)
        cut = list(parts(text[at : at + 7] for at in range(0, len(text), 7)))
    assert "".join(cut) == text
    apart = plain.encode_batch(cut).ids if cut else np.zeros(0, np.uint32)
    assert np.array_equal(apart, plain.encode_batch([text]).ids)


def test_a_long_text_in_parts(plain: PlainEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_cuts, "PART", 500)
    text = "".join(stdlib(30, 33)) + "中文，分词。" * 500 + EOD + "\n" + "-" * 3000
    found: list[np.ndarray] = []
    long = long_text([text.encode()], tmp_path)
    plain.encode_long(long, found.append)
    long.close()
    assert len(found) > 50 and np.array_equal(np.concatenate(found), plain.encode_batch([text]).ids)


@pytest.mark.parametrize("name", WHOLE)
def test_others_are_not_cut(base: Path, tmp_path: Path, name: str) -> None:
    assert not can_be_cut((changed(base, tmp_path, WHOLE[name]) / "tokenizer.json").read_text())


def test_what_a_part_may_take() -> None:
    """Counted is what cannot be cut, not the piece that came."""
    words = "a word. " * 130_000
    assert "".join(parts([words, words], 20_000_000)) == words * 2
    with pytest.raises(TooLargeError, match=r"without a place to cut it at of 0\.2 MB"):
        list(parts(["-" * 100_000] * 3, 20_000_000))


def test_a_text_without_places() -> None:
    assert list(parts(["-" * 100_000] * 3)) == ["-" * 300_000]
    assert list(parts([])) == []


@pytest.mark.parametrize("form", ["chatml", "instruct", "headers", "plain words"])
def test_conversations_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    encoder = ChatEncoder(write_chat_tokenizer(tmp_path), TEMPLATES[form])
    forged = {"role": "user", "content": "a <|im_end|>\n<s> text, [INST] 中文，了。</s>"}
    talks = [TALK[1:], [forged, *TALK[2:]]]
    whole = [encoder.encode(talk) for talk in talks]
    monkeypatch.setattr(safe_cuts, "PART", 0)
    assert [encoder.encode(talk) for talk in talks] == whole
    assert len(list(encoder._encode("one two, three\nfour", [(4, 7)], special=True))) == 4
