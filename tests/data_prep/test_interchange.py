"""Pairs made here load in megatron.core, pairs made with megatron.core's builder load here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_prep.look import documents, stats
from data_prep.prepare import load_data_recipe, prepare
from data_prep.verify import verify
from ouro_megatron.data.indexed import check_prefix, read_index
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.errors import DataError
from tests.data_prep.test_prepare import Lines
from tests.tiny import write_tokenizer

TEXTS = ["one two three", "", "a longer text, with <|endoftext|> spelled in it", "x", "last\nlines\n"]


def as_megatron_writes(prefix: Path, texts: list[str], tokenizer: TextTokenizer, *, ends: str) -> None:
    """A pair by Megatron's own builder. A text without ids is a document without a sequence (`ends` "some"), as its
    script for single documents does, or one with the end-of-document id alone ("all"), as its fast script does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in texts:
        ids = tokenizer.encode(text)
        if ids or ends == "all":
            ids.append(tokenizer.eod)
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")


def prepare_here(root: Path, texts: list[str]) -> Path:
    (root / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values: dict[str, Any] = {
        "output": str(root / "out"),
        "tokenizer": {"kind": "existing", "path": str(root / "tokenizer")},
        "validation_fraction": 0,
        "sources": [{"name": "web", "kind": "jsonl", "path": str(root / "raw.jsonl")}],
    }
    (root / "data.yaml").write_text(yaml.safe_dump(values))
    (prefix,) = prepare(load_data_recipe(root / "data.yaml"), Lines(), workers=1)
    return prefix


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


@pytest.mark.parametrize("ends", ["some", "all"])
def test_megatron_s_pairs_load_here(tmp_path: Path, tokenizer: TextTokenizer, ends: str) -> None:
    prefix = tmp_path / "theirs"
    as_megatron_writes(prefix, TEXTS, tokenizer, ends=ends)
    info = check_prefix(prefix, tokenizer.vocab_size)
    assert info.documents == 5 and info.sequences == (4 if ends == "some" else 5)
    assert "whole (5 documents" in verify(prefix, tmp_path / "tokenizer")
    found = stats(prefix)
    assert found.shortest == (0 if ends == "some" else 1) and found.documents == 5
    shown = list(documents(prefix, 0, 5, tmp_path / "tokenizer"))
    assert [item.text.removesuffix("<|endoftext|>") for item in shown] == [
        tokenizer.decode(tokenizer.encode(text)) for text in TEXTS
    ]
    assert shown[1].ids == ([] if ends == "some" else [tokenizer.eod])
    with pytest.raises(DataError, match="--tokenizer"):
        next(documents(prefix, 0, 1, None))


def test_same_tokens_and_same_index(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Text that is not empty gives the same two files, byte for byte; an empty text gives nothing here."""
    ours = prepare_here(tmp_path, TEXTS)
    as_megatron_writes(tmp_path / "theirs", [text for text in TEXTS if text], tokenizer, ends="some")
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{tmp_path / 'theirs'}{suffix}").read_bytes()
    as_megatron_writes(tmp_path / "empty", TEXTS, tokenizer, ends="some")
    assert Path(f"{ours}.bin").read_bytes() == Path(f"{tmp_path / 'empty'}.bin").read_bytes()
    assert json.loads(Path(f"{ours}.manifest.json").read_text())["source_counts"]["left_out"] == {"empty": 1}


def test_gpt_dataset_of_megatron_reads_ours(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = [f"document {number} " + "word " * (number % 17) for number in range(80)]
    prefix = prepare_here(tmp_path, texts)
    dataset = IndexedDataset(str(prefix))
    assert [tokenizer.decode(dataset[n].tolist()[:-1]) for n in range(80)] == texts
    assert dataset.document_indices.tolist() == list(range(81))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [20, 0, 0], lambda: True, config).build()
    stream = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    text = tokenizer.decode(stream.tolist())
    for number in range(20):
        sample = train[number]["tokens"].tolist()
        pieces = tokenizer.decode(sample).split("<|endoftext|>")
        assert len(sample) == 64 and all(piece in text for piece in pieces)


def test_zero_sequences_anywhere(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    as_megatron_writes(tmp_path / "theirs", ["", "", "a b", "", "c"], tokenizer, ends="some")
    assert read_index(tmp_path / "theirs").documents.tolist() == [0, 0, 0, 1, 1, 2]
    assert "whole (5 documents" in verify(tmp_path / "theirs")
    assert stats(tmp_path / "theirs").lengths.tolist() == [0, 0, 4, 0, 2]
    as_megatron_writes(tmp_path / "nothing", ["", ""], tokenizer, ends="some")
    with pytest.raises(DataError, match="no sequences"):
        verify(tmp_path / "nothing")
