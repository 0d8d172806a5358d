"""ProLong: documents cut by packs, inside characters too; shards that are missing; tokenizers that are others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.fixtures.llama import byte_ids, pack, write_llama_tokenizer, write_packs
from data_prep.fixtures.texts import chinese, english
from data_prep.fixtures.writers import write_mds
from data_prep.sources import prolong
from data_prep.sources.llama_bytes import BEGIN, END, END_OF_TURN
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all, read_apart, source_of

TEXTS = [f"{number}{chinese(number, 50)}🙂{english(number, 9)}" for number in range(9)]
LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_tokenizer(tmp_path_factory.mktemp("llama"))


def settings(folder: Path, tokenizer: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "prolong", "path": str(folder), "tokenizer": str(tokenizer), **more}


def whole_texts() -> list[str]:
    """Documents as far as whole packs reach."""
    ids = sum(len(text.encode()) + 2 for text in TEXTS) // LENGTH * LENGTH
    found = []
    for text in TEXTS:
        size = len(text.encode()) + 2
        found.append(text if size <= ids else text.encode()[: max(0, ids - 1)].decode("utf-8", errors="ignore"))
        ids -= size
    return [text for text in found if text]


def test_joined_documents_are_whole(tmp_path: Path, tokenizer: Path) -> None:
    write_packs(tmp_path / "book" / "proc00-64", pack(TEXTS, LENGTH), rows_a_shard=3)
    documents, faults = read_all(settings(tmp_path, tokenizer, join=True))
    assert not faults
    assert [document.text for document in documents] == whole_texts()
    assert {document.fields["domain"] for document in documents} == {"book"}


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_long_joined_documents_are_not_held(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """`cut`: which byte of a character the corpus begins with, and how many packs are missing at its end."""
    monkeypatch.setattr(prolong, "LONG", LENGTH)
    texts = [text * (1 + 3 * ((number + 1) % 3)) for number, text in enumerate(TEXTS)]
    texts.append("🙂" * 200)
    rows = pack(texts, LENGTH)
    rows[0]["input_ids"][0] = byte_ids("🙂")[cut] if cut else BEGIN  # type: ignore[index]
    write_packs(tmp_path / "book" / "proc00-64", rows[: len(rows) - cut], rows_a_shard=3)
    held, no_faults = read_all(settings(tmp_path, tokenizer, join=True))
    apart, faults = read_apart(settings(tmp_path, tokenizer, join=True), tmp_path)
    assert [text for text, _ in apart] == [document.text for document in held] and faults == no_faults
    assert {long for text, long in apart if len(text.encode()) > 2 * LENGTH} == {True}
    assert any(not long for _, long in apart)


@pytest.mark.parametrize("begin", [False, True])
def test_pieces_lose_no_more_than_the_cut_character(tmp_path: Path, tokenizer: Path, begin: bool) -> None:
    rows = pack(TEXTS, LENGTH, continued_begin=begin)
    assert any(row["input_ids"][-1] != END for row in rows)  # type: ignore[index]
    write_packs(tmp_path / "book" / "proc00-64", rows, rows_a_shard=3)
    documents, faults = read_all(settings(tmp_path, tokenizer))
    assert not faults and not any("\ufffd" in document.text for document in documents)
    read = "".join(document.text for document in documents)
    wanted = "".join(TEXTS)
    at = missing = 0
    for char in read:  # what was read is what was written, less a character a cut
        found = wanted.index(char, at)
        missing, at = missing + found - at, found + 1
    assert missing <= len(rows)
    assert len(documents) > len(TEXTS) - 1


def test_a_pack_without_bounds_is_one_document(tmp_path: Path, tokenizer: Path) -> None:
    ids = [BEGIN, *byte_ids("one document"), END]
    rows: list[dict[str, object]] = [{"domain": "wiki", "input_ids": ids, "length": len(ids)}] * 2
    write_packs(tmp_path / "wiki" / "proc00-64", rows, rows_a_shard=2, indices=False)
    documents, faults = read_all(settings(tmp_path, tokenizer))
    assert [document.text for document in documents] == ["one document"] * 2 and not faults


def test_outer_marks_go_and_inner_marks_stay(tmp_path: Path, tokenizer: Path) -> None:
    inner = [128006, *byte_ids("user"), 128007, *byte_ids("\n\nhi"), END_OF_TURN, *byte_ids("yes")]
    ids = [BEGIN, *inner, END_OF_TURN, END]
    bounds = np.array([[0, len(ids)]])
    write_packs(tmp_path / "tuluv2" / "p", [{"domain": "t", "indices": bounds, "input_ids": ids, "length": 9}], 1)
    (document,), _ = read_all(settings(tmp_path, tokenizer))
    assert document.text == "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>yes"


def test_words_of_the_real_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    ids = [BEGIN, 2028, 374, 264, 1296, 11914, 13, END]
    row: dict[str, object] = {"domain": "x", "indices": np.array([[0, 8]]), "input_ids": ids, "length": 8}
    write_packs(tmp_path / "x" / "p", [row], 1)
    assert read_all(settings(tmp_path, tokenizer))[0][0].text == "This is a test sentence."


def test_loss_mask_of_tokens_becomes_spans_of_characters(tmp_path: Path, tokenizer: Path) -> None:
    question, answer = "问题？", "答案🙂!"
    ids = [BEGIN, *byte_ids(question), *byte_ids(answer), END]
    mask = [0] * (1 + len(question.encode())) + [1] * (len(answer.encode()) + 1)
    row = {"input_ids": ids, "indices": np.array([[0, len(ids)]]), "mask": mask}
    encodings = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "mask": "ndarray:uint8"}
    write_mds(tmp_path / "chat" / "p", [[row]], encodings)
    (document,), faults = read_all(settings(tmp_path, tokenizer))
    assert not faults and document.text == question + answer
    assert document.loss_spans == ((len(question), len(question) + len(answer)),)


def test_missing_and_foreign_shards(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "book" / "proc21-64"
    shards = write_packs(folder, pack(TEXTS, LENGTH), rows_a_shard=2)
    all_documents, _ = read_all(settings(tmp_path, tokenizer))
    shards[0].rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"lists shard\.00000\.mds, which is not there \(1 of \d+ shards"):
        source_of(settings(tmp_path, tokenizer)).units(1 << 20)
    rest, faults = read_all(settings(tmp_path, tokenizer, partial=True))
    assert 0 < len(rest) < len(all_documents) and not faults
    (tmp_path / "away").rename(shards[0])
    (folder / "shard.00099.mds").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard\.00099\.mds is not in its index\.json"):
        source_of(settings(tmp_path, tokenizer)).units(1 << 20)


def test_every_cut_of_a_shard_is_noticed(tmp_path: Path, tokenizer: Path) -> None:
    (shard,) = write_packs(tmp_path / "b" / "p", pack(TEXTS[:4], 128), rows_a_shard=99)
    whole, _ = read_all(settings(tmp_path, tokenizer))
    content = shard.read_bytes()
    for size in [*range(0, 60), *range(60, len(content), 97)]:
        shard.write_bytes(content[:size])
        documents, faults = read_all(settings(tmp_path, tokenizer))
        assert documents == whole[: len(documents)]
        assert faults and faults[-1].ends_unit


def test_broken_rows_are_passed_over(tmp_path: Path, tokenizer: Path) -> None:
    good = [BEGIN, *byte_ids("good"), END]
    rows: list[dict[str, object]] = [
        {"domain": "x", "indices": np.array([[0, 6]]), "input_ids": good, "length": 6},
        {"domain": "x", "indices": np.array([[0, 60]]), "input_ids": good, "length": 6},
        {"domain": "x", "indices": np.array([[0, 2]]), "input_ids": [BEGIN, 999_999], "length": 2},
        {"domain": "x", "indices": np.array([[0, 3]]), "input_ids": [BEGIN, *byte_ids("é")[:1], END], "length": 3},
        {"domain": "x", "indices": np.array([[0, 6]]), "input_ids": good, "length": 6},
    ]
    write_packs(tmp_path / "x" / "p", rows, 9)
    documents, faults = read_all(settings(tmp_path, tokenizer))
    assert [document.text for document in documents] == ["good", "good"]
    assert [fault.where for fault in faults] == ["row 1", "row 2"]
    assert "bounds" in faults[0].reason and "999999" in faults[1].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["model"]["vocab"].pop("Ġfiller500"), "127,999 ids below 128,000"),
        (lambda content: content["added_tokens"].pop(0), "id 128000 is None"),
        (lambda content: _swap(content["model"]["vocab"], "This", "Ġfiller500"), "id 2028 is 'Ġfiller500'"),
        (lambda content: content.pop("model"), "no readable tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, tokenizer: Path, change: Any, words: str) -> None:
    write_packs(tmp_path / "x" / "p", pack(TEXTS, LENGTH), 9)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    change(content)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        source_of(settings(tmp_path, other)).units(1 << 20)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        source_of(settings(tmp_path, tmp_path / "nowhere")).units(1 << 20)


def _swap(vocab: dict[str, int], one: str, other: str) -> None:
    vocab[one], vocab[other] = vocab[other], vocab[one]
