"""Texts that are not held in memory have the ids of those that are."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.byte_level import ByteLevelEncoder
from data_prep.encode import PlainEncoder
from data_prep.long_text import long_text
from data_prep.writer import PairWriter
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.data_prep.test_byte_level import EOD, all_pairs, needs_extension, random_bpe, stdlib, trained


def in_pieces(encoder: Any, text: str, folder: Path) -> tuple[np.ndarray, int]:
    """The ids of `encode_long`, and in how many pieces they came."""
    found: list[np.ndarray] = []
    long = long_text([text.encode()], folder)
    encoder.encode_long(long, found.append)
    long.close()
    return np.concatenate(found), len(found)


def handed_out(encoder: ByteLevelEncoder, text: str) -> tuple[list[np.ndarray], list[int]]:
    """The pieces of ids that the C encoder gives, and how far it had read with each."""
    pieces: list[np.ndarray] = [np.zeros(0, np.uint32)]
    read = [0]

    def sink(ids: bytearray, place: int) -> None:
        pieces.append(np.frombuffer(ids, np.uint32))
        read.append(place)

    encoder._encoder.encode_long(text.encode(), sink)
    return pieces, read


@needs_extension
@pytest.mark.parametrize("digits", [True, False])
def test_ids_in_pieces(tmp_path: Path, digits: bool) -> None:
    tokenizer = load_tokenizer(trained(tmp_path, digits, stdlib(0, 25)))
    text = (
        f"spelled {EOD}<|im_start|>"
        + "".join(stdlib(30, 60))
        + "acgt" * 200_000
        + " " * 100_000
        + "中文" * 100_000
        + "7" * 1000
        + "é"
    )
    fast, plain = ByteLevelEncoder(tokenizer), PlainEncoder(tokenizer)
    expected = plain.encode_batch([text]).ids
    ids, pieces = in_pieces(fast, text, tmp_path)
    assert pieces > 3 and np.array_equal(ids, expected) and tokenizer.eod not in ids
    assert np.array_equal(in_pieces(plain, text, tmp_path)[0], expected)


@needs_extension
@pytest.mark.parametrize("window", [16, 17, 40, 200])
@pytest.mark.parametrize("make", ["all pairs", "random", "trained"])
def test_words_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, make: str) -> None:
    """A long word is merged a window at a time, where the ends of windows change nothing, and its ids are handed out
    before its end."""
    monkeypatch.setattr("data_prep.byte_level._WINDOW", window)
    monkeypatch.setattr("data_prep.byte_level._PIECE", 3)
    choose = random.Random(window)
    letters = "abcé"
    for seed in range(4 if make == "random" else 1):
        folder = tmp_path / str(seed)
        if make == "random":
            random_bpe(folder, seed)
        elif make == "all pairs":
            all_pairs(folder, True)
        else:
            trained(folder, True, ["".join(choose.choices("acgt", k=300)) for _ in range(300)])
            letters = "acgt"
        tokenizer = load_tokenizer(folder)
        texts = ["".join(choose.choices(letters, k=choose.choice([15, 16, 60, 500, 5000]))) for _ in range(60)]
        texts += [letter * count for letter in letters for count in (64, 1023, 4099)]
        texts += [("".join(choose.choices(letters, k=7)) * 900)[: choose.randrange(3000, 6000)] for _ in range(10)]
        encoder = ByteLevelEncoder(tokenizer)
        longest = "".join(choose.choices(letters, k=min(4 * encoder._encoder.unsettled + 1000, 60_000)))
        fast, plain = encoder.encode_batch([*texts, longest]), PlainEncoder(tokenizer).encode_batch([*texts, longest])
        assert np.array_equal(fast.lengths, plain.lengths) and np.array_equal(fast.ids, plain.ids)
        whole = longest if make != "all pairs" else longest[:1000]  # there any two letters merge: all is unsettled
        ids = [np.concatenate(handed_out(encoder, text)[0]) for text in (*texts, whole)]
        assert np.array_equal(np.concatenate(ids[:-1]), fast.ids[: -int(fast.lengths[-1])])
        if make != "all pairs":
            assert np.array_equal(ids[-1], plain.ids[-int(plain.lengths[-1]) :])


@needs_extension
def test_a_word_is_not_held(tmp_path: Path) -> None:
    """Ids come while the rest of the word has not been merged, and no more at one time than a piece."""
    encoder = ByteLevelEncoder(load_tokenizer(trained(tmp_path, True, stdlib(0, 25))))
    assert 1000 < encoder._encoder.unsettled < 50_000  # 2,700 merges of tokens of a few bytes
    for letters in ("acgt", "中文字分词", " "):
        text = "".join(random.Random(0).choices(letters, k=3_000_000))
        pieces, read = handed_out(encoder, text)
        held = [(sum(map(len, pieces[:number])), place) for number, place in enumerate(read) if len(pieces[number])]
        assert max(map(len, pieces)) <= 1 << 18
        if letters != " ":  # whose tokens are of up to 64 spaces and more
            assert len(held) > 3 and held[len(held) // 2][1] < 0.8 * len(text.encode())
        assert np.array_equal(np.concatenate(pieces), encoder.encode_batch([text]).ids)
        looked = [place for number, place in enumerate(read) if not len(pieces[number])]
        assert len(text.encode()) < 1 << 22 or looked  # its end was looked for, and what was read is let go of


@needs_extension
def test_a_text_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    encoder = ByteLevelEncoder(load_tokenizer(all_pairs(tmp_path, True)))._encoder
    for data in (b"abc\xe4\xb8", b"\xf0", b"\x80\x80\x80\x80\x80"):
        with pytest.raises(ValueError, match="ends inside a character"):
            encoder.encode_long(data, print)
    encoder.encode_long(b"", print)
    choose = random.Random(0)
    for _ in range(300):  # any ids, but no crash
        encoder.encode_long(
            bytes(choose.choices([0x20, 0x41, 0x80, 0xC3, 0xE4, 0xF7, 0xFF], k=50)) + b"ab12", lambda *_: 0
        )


@needs_extension
def test_a_sink_that_fails_or_encodes(tmp_path: Path) -> None:
    encoder = ByteLevelEncoder(load_tokenizer(all_pairs(tmp_path, True)))
    text = b"one two, three! " * 100_000

    def fail(ids: bytearray, done: int) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        encoder._encoder.encode_long(text, fail)
    found = bytearray()

    def nested(ids: bytearray, done: int) -> None:
        assert encoder.encode_batch(["two words"]).lengths.tolist()
        found.extend(ids)

    encoder._encoder.encode_long(text, nested)
    assert found == encoder._encoder.encode_batch([text.decode()])[0]


def test_a_document_that_an_index_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.writer.MAX_LENGTH", 5)

    def write(*pieces: list[int]) -> Callable[[Callable[[np.ndarray], None]], None]:
        def put_all(put: Callable[[np.ndarray], None]) -> None:
            for piece in pieces:
                put(np.array(piece))

        return put_all

    with PairWriter(tmp_path / "pair", np.dtype("<u2")) as pair:
        pair.add_many(np.array([1, 2]), np.array([2]), np.array([True, False]))
        assert pair.add_long(write([1, 2, 3], [4, 5, 6])) is None
        assert pair.add_long(write([7, 8], [9])) == 3
    assert np.fromfile(tmp_path / "pair.bin", np.uint16).tolist() == [1, 2, 7, 8, 9]
    assert np.fromfile(tmp_path / "pair.loss.bin", np.uint8).tolist() == [1, 0, 1, 1, 1]
