"""Samples and their order: fixed by content and seed, not by ranks, length of the run or where files lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ouro_megatron.data.dataset import SampleDataset, build_dataset
from ouro_megatron.data.fingerprint import blend_fingerprint, check_fingerprint
from ouro_megatron.data.indexed import check_prefix, read_index
from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry, DataSection
from tests.tiny import VOCAB, write_corpus, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "two sources"
    write_tokenizer(root / "tokenizer")
    write_corpus(root / "a", documents=40, seed=1)
    write_corpus(root / "b.v1", documents=15, seed=2)
    return root


def build(folder: Path, samples: int = 100, cache: Path | None = None, **changes: object) -> SampleDataset:
    seed = changes.pop("seed", 5)
    assert isinstance(seed, int)
    entries = [BlendEntry(path=folder / "a", weight=3), BlendEntry(path=folder / "b.v1", weight=1)]
    settings = data_section(folder, entries, **changes)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return build_dataset(settings, samples=samples, seed=seed, tokenizer=tokenizer, cache=cache, split_name="train")


def data_section(folder: Path, entries: list[BlendEntry], **changes: object) -> DataSection:
    values = {"sequence_length": 32, "tokenizer": folder / "tokenizer", "train": entries, **changes}
    return DataSection.model_validate(values)


def tokens(dataset: SampleDataset, count: int) -> np.ndarray:
    return np.stack([dataset[k]["tokens"].numpy() for k in range(count)])


def test_labels_are_the_next_tokens(folder: Path) -> None:
    sample = build(folder)[3]
    assert sample["tokens"].shape == sample["labels"].shape == (32,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["loss_mask"].tolist() == [1.0] * 32


def test_a_longer_run_sees_the_same_samples_first(folder: Path) -> None:
    assert np.array_equal(tokens(build(folder, 60), 60), tokens(build(folder, 900), 60))


def test_seed_changes_the_order(folder: Path) -> None:
    assert not np.array_equal(tokens(build(folder), 50), tokens(build(folder, seed=6), 50))


def test_blend_hits_its_weights(folder: Path) -> None:
    counts = build(folder, 400).counts()
    assert counts["a"] == pytest.approx(300, abs=2)
    assert counts["b.v1"] == pytest.approx(100, abs=2)


def test_sources_of_a_range_are_counted(folder: Path) -> None:
    dataset = build(folder, 400)
    names = [dataset.source_of(k) for k in range(37, 211)]
    assert dataset.source_counts(37, 211) == {name: names.count(name) for name in ("a", "b.v1")}
    assert dataset.source_counts(0, 400) == dataset.counts()


def test_a_token_beyond_the_vocabulary_names_the_source(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "damaged")
    dataset = build(copied, 60)
    with (copied / "b.v1.bin").open("r+b") as file:  # a lost page, as it comes back from a broken disk
        file.write(b"\xff" * (copied / "b.v1.bin").stat().st_size)
    bad = next(k for k in range(60) if dataset.source_of(k) == "b.v1")
    with pytest.raises(DataError, match=rf"sample {bad} holds token 65535.*source 'b\.v1' has been damaged"):
        dataset[bad]
    good = next(k for k in range(60) if dataset.source_of(k) == "a")
    assert dataset[good]["tokens"].shape == (32,)


def test_cache_is_used_and_data_may_move(folder: Path, tmp_path: Path) -> None:
    first = tokens(build(folder, cache=tmp_path / "cache"), 50)
    made = sorted(path.name for path in (tmp_path / "cache").iterdir())
    moved = shutil.copytree(folder, tmp_path / "moved here")
    assert np.array_equal(tokens(build(moved, cache=tmp_path / "cache"), 50), first)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == made


def test_end_of_document_can_be_left_out(folder: Path) -> None:
    dataset = build(folder, mask_end_of_document=True)
    masked = [dataset[k] for k in range(40)]
    assert any((sample["loss_mask"] == 0).any() for sample in masked)
    for sample in masked:
        assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_global_batch_out(ranks: int) -> None:
    seen = []
    for rank in range(ranks):
        for microbatch in GlobalBatchSampler(2, rank, ranks).indices(consumed=48, global_batch=16):
            assert len(microbatch) == 2
            seen += microbatch
    assert sorted(seen) == list(range(48, 64))


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(DataError, match=r"batch\.global_tokens"):
        GlobalBatchSampler(4, 0, 3).indices(0, 16)


def test_reader_gives_the_samples_in_order_and_ends_with_the_data(folder: Path) -> None:
    dataset = build(folder, 24)
    reader = MicrobatchReader(dataset, GlobalBatchSampler(3), torch.device("cpu"))
    read = [batch["tokens_bs"] for start in (0, 12) for batch in reader.step(start, 12)]
    assert np.array_equal(torch.cat(read).numpy(), tokens(dataset, 24))
    with pytest.raises(DataError, match="24"):
        reader.step(24, 12)
    reader.close()


def test_fingerprint_accepts_moved_and_refuses_changed_data(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")

    def take(root: Path, weight: float = 1.0) -> dict:
        entries = [BlendEntry(path=root / "a", weight=weight)]
        return blend_fingerprint(data_section(folder, entries), seed=1, tokenizer=tokenizer)

    saved = json.loads(json.dumps(take(folder)))
    moved = shutil.copytree(folder, tmp_path / "moved")
    check_fingerprint(saved, take(moved))
    with pytest.raises(DataError, match="weight"):
        check_fingerprint(saved, take(folder, weight=2.0))
    write_corpus(moved / "a", documents=41, seed=1)
    with pytest.raises(DataError, match=r"token count changed.*\n.*document count"):
        check_fingerprint(saved, take(moved))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy") / "a"


def test_truncated_bin(copy: Path) -> None:
    path = copy.with_name("a.bin")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a\.bin: too short"):
        check_prefix(copy, VOCAB)


def test_truncated_idx(copy: Path) -> None:
    path = copy.with_name("a.idx")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.idx: .*cut short"):
        check_prefix(copy, VOCAB)


def test_idx_of_another_bin(copy: Path) -> None:
    copy.with_name("a.idx").write_bytes(copy.with_name("b.v1.idx").read_bytes())
    with pytest.raises(DataError, match=r"a\.bin: too long"):
        check_prefix(copy, VOCAB)


def test_not_an_index(copy: Path) -> None:
    copy.with_name("a.idx").write_bytes(b"hello, I am text" * 9)
    with pytest.raises(DataError, match="bad header"):
        read_index(copy)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file(copy: Path, suffix: str) -> None:
    copy.with_name(f"a.{suffix}").unlink()
    with pytest.raises(DataError, match=rf"a\.{suffix}"):
        check_prefix(copy, VOCAB)


def test_vocabulary_larger_than_the_models(copy: Path) -> None:
    with pytest.raises(DataError, match=r"model\.vocab"):
        load_tokenizer(copy.parent / "tokenizer", model_vocab=50)


def test_too_little_data(folder: Path) -> None:
    with pytest.raises(DataError, match="do not fill one sample"):
        build(folder, sequence_length=100_000)


def test_more_pairs_than_a_blend_holds(folder: Path) -> None:
    entries = [BlendEntry(path=folder / "a", weight=1)] * 32_767
    settings, tokenizer = data_section(folder, entries), load_tokenizer(folder / "tokenizer")
    with pytest.raises(DataError, match="train data: 32,767 pairs; a blend holds 32,766 at most"):
        build_dataset(settings, samples=1, seed=0, tokenizer=tokenizer, cache=None, split_name="train")


def test_text_that_spells_a_special_token_stays_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"
