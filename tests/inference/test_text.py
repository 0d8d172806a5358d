"""Whole characters, stop texts across token bounds."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.inference.text import StopText, TextPieces
from tests.tiny import write_tokenizer


def test_pieces_join_to_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    pieces = TextPieces(tokenizer)
    assert "".join(pieces.add(token) for token in tokenizer.encode("a b")) == "a b"


def byte_tokenizer(folder: Path) -> TextTokenizer:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0} | {x: i for i, x in enumerate(letters, 1)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return load_tokenizer(folder)


def test_characters_of_several_tokens_appear_whole(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    pieces = TextPieces(tokenizer)
    shown = [pieces.add(token) for token in tokenizer.encode("aé€😀z")]
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😀", "z"]
    cut = TextPieces(tokenizer)
    assert [cut.add(token) for token in tokenizer.encode("€")[:2]] == ["", ""]
    assert cut.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stopped"),
    [
        (["ab", "c<", "en", "d>x"], ["<end>"], "abc", True),
        (["a<", "b"], ["<end>"], "a<b", False),
        (["aaab"], ["aab"], "a", True),
        (["x", "y", "z"], ["yz", "xy"], "", True),
        (["one\n", "\ntwo"], ["\n\n"], "one", True),
        (["abc"], [], "abc", False),
    ],
)
def test_stop_texts(pieces: list[str], stops: list[str], text: str, stopped: bool) -> None:
    watch, shown, found = StopText(stops), "", False
    for piece in pieces:
        more, found = watch.add(piece)
        shown += more
        if found:
            break
    assert (shown + ("" if found else watch.finish()), found) == (text, stopped)


@given(st.text("ab<", max_size=30), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_gives_the_text_before_the_first_complete_stop(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """Whatever the tokens' bounds: nothing of a stop text is ever shown, nothing else is lost."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    watch, shown = StopText(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more, found = watch.add(text[start:end])
        shown += more
        if found:
            assert not any(stop in shown for stop in stops)
            assert any(text[len(shown) :].startswith(stop) for stop in stops)
            return
    assert shown + watch.finish() == text
    assert not any(stop in text for stop in stops)
