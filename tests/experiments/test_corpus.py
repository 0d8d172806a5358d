"""Corpora on disk: what the trainer reads is what was drawn; tests stay out of training; all or nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ouro_megatron.data.dataset import build_dataset
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.data.tokens import Stretch, TokenReader
from ouro_megatron.errors import DataError
from ouro_megatron.experiments.corpus import distinct, make_corpus
from ouro_megatron.experiments.tasks.mano import Mano
from ouro_megatron.recipe.schema import BlendEntry, DataSection

MANO = {"kind": "mano", "operations": 2, "modulus": 5}


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def documents(prefix: Path) -> list[tuple[list[int], list[bool]]]:
    reader = TokenReader(prefix)
    found = [reader.read([Stretch(i, 0, int(length))]) for i, length in enumerate(reader.lengths)]
    return [(ids.tolist(), counts.tolist()) for ids, counts in found]


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (make_corpus(tmp_path / name, MANO, 3000, 100) for name in ("a", "b"))
    assert first.folder.name == second.folder.name
    assert files(first.folder) == files(second.folder)
    assert make_corpus(tmp_path / "a", MANO, 3001, 100).folder != first.folder
    before = first.train.with_suffix(".bin").stat().st_mtime_ns
    assert make_corpus(tmp_path / "a", MANO, 3000, 100).train.with_suffix(".bin").stat().st_mtime_ns == before


def test_no_test_example_is_in_training_and_the_mask_is_on_answers(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, MANO, 5000, 300)
    train, tests = documents(corpus.train), corpus.tests()["l=2"]
    asked = {(*prompt, *answer) for prompt, answer in tests}
    assert len(train) == 5000 and len(asked) == len(tests) == 300
    assert not asked & {tuple(ids) for ids, _ in train}
    assert all(counts == [False] * (len(ids) - 1) + [True] for ids, counts in train)
    assert [ids for ids, _ in documents(corpus.test)] == [[*prompt, *answer] for prompt, answer in tests]
    facts = corpus.facts
    # 2250 expressions of two operations, 300 of them tested, and 75 of one.
    assert facts["possible_examples"] == {"l=2": 2 * 9 * 125}
    assert facts["train_distinct"] == len({tuple(ids) for ids, _ in train}) <= 2250 - 300 + 75
    assert facts["overlap"] == 0 and facts["left_out_because_tested"] > 100
    assert facts["train_tokens"] == sum(len(ids) for ids, _ in train)


def test_text_of_the_tokenizer_is_the_words(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, MANO, 100, 10)
    tokenizer, words = load_tokenizer(corpus.tokenizer), Mano(operations=2, modulus=5).words
    assert tokenizer.vocab_size == len(words) and tokenizer.eod == 0
    prompt, answer = corpus.tests()["l=2"][0]
    text = " ".join(words[token] for token in [*prompt[1:], *answer])
    assert tokenizer.encode(text) == [*prompt[1:], *answer]


def test_packed_samples_hold_whole_examples(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, MANO, 2000, 10)
    entry = BlendEntry(path=corpus.train, weight=1)
    settings = DataSection(sequence_length=40, tokenizer=corpus.tokenizer, train=[entry], packing="in_order")
    dataset = build_dataset(
        settings, samples=50, seed=1, tokenizer=load_tokenizer(corpus.tokenizer), cache=None, split_name="train"
    )
    texts = {tuple(ids) for ids, _ in documents(corpus.train)}
    for k in range(50):
        sample = dataset[k]
        ends = torch.nonzero(sample["loss_mask"]).reshape(-1).tolist()
        assert ends
        start = 0
        for end in ends:
            assert (*sample["tokens"][start : end + 1].tolist(), int(sample["labels"][end])) in texts
            assert sample["positions"][start] == 0
            start = end + 1


def test_a_task_that_is_all_tested_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer test_examples"):
        make_corpus(tmp_path, {"kind": "mano", "operations": 1, "modulus": 2}, 100, 1000)
    assert list(tmp_path.iterdir()) == []


def test_distinct_stops_when_there_are_no_more() -> None:
    task, rng = Mano(operations=1, modulus=2), np.random.default_rng(0)
    found = distinct(lambda count: task.draw_test("l=1", count, rng), 50)
    assert len(found) == 3 * 4 == len(np.unique(found.hashes()))


def test_biographies_keep_every_round_and_have_no_tests(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"kind": "capo", "people": 30, "names": [5, 5, 5]}, 90, 10)
    assert len(documents(corpus.train)) == 90
    assert all(all(counts) for _, counts in documents(corpus.train))
    assert corpus.tests() == {} and not corpus.test.with_suffix(".idx").exists()
    assert json.loads((corpus.folder / "facts.json").read_text())["test_examples"] == {}
