"""Plain text, text with loss spans and conversations in one batch."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.document_encoder import DocumentEncoder
from data_prep.encode import batch_encoder
from data_prep.sources.base import Document
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.data_prep.test_chat import write_chat_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "chatty")


def encoder(folder: Path) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(folder), batch_encoder(folder), folder)


def test_a_mixed_batch_keeps_its_order(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    prompt, answer = "Question: 12 é the turn?\n", "It is. </s> 7"
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer"}]
    batch = [
        Document("a", "plain text"),
        Document("b", prompt + answer, loss_spans=((len(prompt), len(prompt + answer)),)),
        Document("c", "", messages=talk),
        Document("d", "", messages=[{"role": "nobody", "content": "x"}]),
        Document("e", "x", loss_spans=((0, 2),)),
        Document("f", "more text"),
    ]
    encoded = encoder(folder).encode(batch)
    assert [isinstance(item, str) for item in encoded.outcome] == [False, False, False, True, True, False]
    assert "loss span 0 to 2 of a text of 1" in str(encoded.outcome[4])
    good = np.array([not isinstance(item, str) for item in encoded.outcome])
    ids, lengths, loss = encoded.only(good)
    assert loss is not None and len(lengths) == 4 and lengths.sum() == len(ids) == len(loss)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    marks = np.split(loss, np.cumsum(lengths)[:-1])
    assert rows[0].tolist() == [*tokenizer.encode("plain text"), tokenizer.eod] and marks[0].all()
    assert rows[1].tolist() == [*tokenizer.encode(prompt + answer), tokenizer.eod]
    assert tokenizer.decode(rows[1][marks[1]].tolist(), skip_special=False) == answer + "</s>"
    assert "the answer" in tokenizer.decode(rows[2][marks[2]].tolist()) and not marks[2][-1]
    assert rows[3].tolist() == [*tokenizer.encode("more text"), tokenizer.eod] and marks[3].all()
    # Without what makes it a mixture, the same ids and no mask.
    plain = encoder(folder).encode([batch[0], batch[5]])
    assert plain.loss is None and plain.ids.tolist() == [*rows[0], *rows[3]]


def test_the_end_counts_when_the_last_character_does(folder: Path) -> None:
    _, _, loss = encoder(folder).encode([Document("a", "one two", loss_spans=((0, 3),))]).only(np.array([True]))
    assert loss is not None and loss[0] and not loss[-1]


def test_only_bad_documents(folder: Path) -> None:
    encoded = encoder(folder).encode([Document("a", "", messages=[])])
    ids, lengths, _ = encoded.only(np.array([False]))
    assert isinstance(encoded.outcome[0], str) and len(ids) == len(lengths) == 0
