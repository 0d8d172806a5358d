"""Batches of text to ids: the same ids as `tokenizers` gives, whatever path they take."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.encode import Encoded, batch_encoder, open_tokenizer
from data_prep.writer import PairWriter
from ouro_megatron.data.indexed import read_index
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer


def test_ids_of_a_batch(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    texts = ["one two", "", "x" * 500, "spelled <|endoftext|> here"]
    encoded = batch_encoder(folder).encode_batch(texts)
    assert encoded.ids.dtype == np.uint32 and encoded.lengths.dtype == np.int64
    tokenizer = load_tokenizer(folder)
    assert np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])[3].tolist() == tokenizer.encode(texts[3])
    assert encoded.lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]


def test_tokenizer_is_kept_while_its_files_stay(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer, encoder = open_tokenizer(folder)
    assert open_tokenizer(folder)[1] is encoder
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content.replace('"A":', '"é":'))
    changed, _ = open_tokenizer(folder)
    assert changed.sha256 != tokenizer.sha256


def test_nothing_to_encode(tmp_path: Path) -> None:
    encoded = batch_encoder(write_tokenizer(tmp_path / "tokenizer")).encode_batch([])
    assert len(encoded.ids) == len(encoded.lengths) == 0


def test_ended_by_and_only() -> None:
    encoded = Encoded(np.array([5, 6, 7], np.uint32), np.array([2, 0, 1]))
    ended = encoded.ended_by(9)
    assert ended.ids.tolist() == [5, 6, 9, 9, 7, 9] and ended.lengths.tolist() == [3, 1, 2]
    chosen = ended.only(np.array([False, True, True]))
    assert chosen.ids.tolist() == [9, 7, 9] and chosen.lengths.tolist() == [1, 2]


def test_add_many_is_add_of_each(tmp_path: Path) -> None:
    dtype = np.dtype("<u2")
    with PairWriter(tmp_path / "one", dtype) as one:
        one.add([1, 2])
        one.add([])
        one.add([3])
    with PairWriter(tmp_path / "many", dtype) as many:
        many.add_many(np.array([1, 2, 3], np.uint32), np.array([2, 0, 1]))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()
    assert read_index(tmp_path / "many").lengths.tolist() == [2, 0, 1]
    with PairWriter(tmp_path / "wrong", dtype) as wrong, pytest.raises(ValueError, match="add up"):
        wrong.add_many(np.array([1], np.uint32), np.array([2]))
