"""Which documents lie together, and what packed samples hold."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.writer import PairWriter
from ouro_megatron.data.dataset import SampleDataset, build_dataset
from ouro_megatron.data.fingerprint import blend_fingerprint, check_fingerprint
from ouro_megatron.data.packing import LongDocuments, PackedBlock, Packing, PackingReport, pack
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import DataSection
from tests.tiny import write_tokenizer

LONG: list[LongDocuments] = ["truncate", "split", "drop"]


def plain_best_fit(slots: list[int], capacity: int) -> list[int]:
    """Slots left in each sequence by best-fit decreasing as it is defined: one piece at a time."""
    left: list[int] = []
    for size in sorted(slots, reverse=True):
        fitting = [room for room in left if room >= size]
        if fitting:
            left[left.index(min(fitting))] -= size
        else:
            left.append(capacity - size)
    return sorted(left)


def packed(lengths: list[int], sequence: int, packing: Packing, long: LongDocuments, block: int) -> list[PackedBlock]:
    return list(pack(np.asarray(lengths, np.int32), sequence, packing, long, block=block))


def contents(blocks: list[PackedBlock]) -> list[list[tuple[int, int, int]]]:
    """For each sequence its pieces: (document, offset, slots)."""
    return [
        list(zip(*(c[b:e].tolist() for c in (x.document, x.offset, x.slots)), strict=True))
        for x in blocks
        for b, e in zip(x.starts[:-1], x.starts[1:], strict=True)
    ]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=60),
    sequence=st.integers(1, 40),
    packing=st.sampled_from(["best_fit", "in_order"]),
    long=st.sampled_from(LONG),
    block=st.sampled_from([7, 1000]),
)
def test_every_prediction_is_packed_once(
    lengths: list[int], sequence: int, packing: Packing, long: LongDocuments, block: int
) -> None:
    blocks = packed(lengths, sequence, packing, long, block)
    report = sum((x.report for x in blocks), PackingReport())
    found: dict[int, list[int]] = {}
    for pieces in contents(blocks):
        assert 0 < sum(slots for _, _, slots in pieces) <= sequence
        assert pieces == sorted(pieces)
        for document, offset, slots in pieces:
            found.setdefault(document, []).extend(range(offset, offset + slots))
    for document, length in enumerate(lengths):
        keep = length - 1
        if length > sequence + 1 and long != "split":
            keep = sequence if long == "truncate" else 0
        assert sorted(found.get(document, [])) == list(range(max(0, keep)))
    assert report.used_slots == sum(map(len, found.values()))
    assert report.slots == report.sequences * sequence == len(contents(blocks)) * sequence
    assert report.documents == len(lengths)
    assert report.tokens == sum(lengths)
    assert report.too_long == sum(length > sequence + 1 for length in lengths)
    lost = sum(n for n in lengths if n < 2)
    lost += sum({"drop": n, "truncate": n - sequence - 1, "split": 0}[long] for n in lengths if n > sequence + 1)
    assert report.dropped_tokens == lost


@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), max_size=80), sequence=st.integers(39, 80))
def test_best_fit_is_best_fit_decreasing(lengths: list[int], sequence: int) -> None:
    left = [
        sequence - sum(p[2] for p in pieces) for pieces in contents(packed(lengths, sequence, "best_fit", "drop", 99))
    ]
    assert sorted(left) == plain_best_fit([length - 1 for length in lengths], sequence)


def test_in_order_keeps_neighbours_together() -> None:
    found = contents(packed([6, 5, 5, 31, 9, 1, 3], 10, "in_order", "split", 99))
    assert [[piece[0] for piece in pieces] for pieces in found] == [[0, 1], [2], [3], [3], [3], [4, 6]]


def test_long_documents_are_refused_until_the_recipe_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"2 of 3 documents .* \(the longest has 30\): set data\.long_documents"):
        list(pack(np.asarray([20, 5, 30], np.int32), 10, "best_fit", None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose tokens say which they are: document i is i, i + 1, .. mod 96 and an end; odd ones count half."""
    root = tmp_path_factory.mktemp("packing") / "with space"
    write_tokenizer(root / "tokenizer")
    generator = np.random.default_rng(0)
    counts: list[np.ndarray] = []
    with PairWriter(root / "talks", np.dtype("<u2")) as writer:
        for number, length in enumerate(generator.integers(1, 60, size=200)):
            writer.add([*((number + np.arange(length - 1)) % 96 + 1).tolist(), 0])
            counts.append(np.arange(length) >= (length // 2 if number % 2 else 0))
    (root / "talks.loss.bin").write_bytes(np.concatenate(counts).astype(np.uint8).tobytes())
    return root


def section(folder: Path, **changes: Any) -> DataSection:
    values = {
        "sequence_length": 64,
        "tokenizer": folder / "tokenizer",
        "train": [{"path": folder / "talks", "weight": 1}],
        "packing": "best_fit",
    }
    return DataSection.model_validate({**values, **changes})


def build(folder: Path, samples: int, cache: Path | None = None, **changes: Any) -> SampleDataset:
    tokenizer = load_tokenizer(folder / "tokenizer")
    settings = section(folder, **changes)
    return build_dataset(settings, samples=samples, seed=3, tokenizer=tokenizer, cache=cache, split_name="train")


def documents(sample: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], ...]]:
    """(inputs, labels, mask) of each document of a sample, padding included."""
    starts = [*np.flatnonzero(sample["positions"].numpy() == 0).tolist(), len(sample["tokens"])]
    columns = [sample[name].int().tolist() for name in ("tokens", "labels", "loss_mask")]
    return [tuple(tuple(c[b:e]) for c in columns) for b, e in itertools.pairwise(starts)]


@pytest.mark.parametrize("packing", ["best_fit", "in_order"])
def test_an_epoch_holds_each_document_once_with_its_mask(folder: Path, packing: str) -> None:
    from ouro_megatron.data.tokens import Stretch, TokenReader

    first = build(folder, 1, packing=packing)
    per_epoch = first.packing[0].sequences
    dataset = build(folder, 2 * per_epoch, packing=packing)
    reader = TokenReader(folder / "talks")
    wanted = []
    for number, length in enumerate(reader.lengths.tolist()):
        if length > 1:
            ids, counts = reader.read([Stretch(number, 0, length)])
            wanted.append((tuple(ids[:-1].tolist()), tuple(ids[1:].tolist()), tuple(counts[1:].astype(int).tolist())))
    epochs = []
    for epoch in range(2):
        samples = [dataset[k] for k in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(sample["tokens"].shape == (64,) for sample in samples)
        found = [item for sample in samples for item in documents(sample)]
        padding = [item for item in found if set(item[1]) == {0} and set(item[0]) == {0}]
        assert all(not any(mask) for _, _, mask in padding)
        assert sorted(item for item in found if item not in padding) == sorted(wanted)
        epochs.append(torch.stack([sample["tokens"] for sample in samples]))
    assert not torch.equal(epochs[0], epochs[1])
    used = sum(len(item[0]) for item in wanted)
    assert first.packing[0].used_slots == used
    assert first.packing[0].waste == pytest.approx(1 - used / (per_epoch * 64))


def test_a_stream_has_its_bounds_from_the_index_and_masks_across_them(folder: Path) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset

    dataset = build(folder, 80, packing="none", document_mask=True)
    bare = build(folder, 80, packing="none")
    (source,) = dataset._blend.datasets
    theirs = source.epochs[0]._indices
    assert isinstance(theirs, GPTDataset)
    for k in range(80):
        sample = dataset[k]
        assert "positions" not in bare[k]
        assert torch.equal(sample["tokens"], bare[k]["tokens"])
        assert torch.equal(sample["labels"], bare[k]["labels"])
        inside = sample["positions"][1:] > 0
        # Inside a document tokens rise by one; at its end stands 0, and what follows it is not to be predicted.
        assert torch.equal(inside, sample["tokens"][:-1] != 0)
        crossing = torch.cat((~inside, (sample["tokens"][-1:] == 0)))
        assert torch.equal(sample["loss_mask"], bare[k]["loss_mask"].masked_fill(crossing, 0.0))
    index = int(dataset._blend.dataset_sample_index[5])
    assert torch.equal(theirs[index]["tokens"], dataset[5]["tokens"])
    assert torch.equal(theirs[index]["labels"], dataset[5]["labels"])


def test_a_longer_run_and_moved_data_see_the_same_packed_samples(folder: Path, tmp_path: Path) -> None:
    def tokens(dataset: SampleDataset) -> torch.Tensor:
        return torch.stack([dataset[k]["tokens"] for k in range(50)])

    first = tokens(build(folder, 50, tmp_path / "cache"))
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert torch.equal(tokens(build(moved, 900, tmp_path / "cache")), first)
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert sum(name.startswith("packing-") for name in names) == 1
    assert not any(name.startswith(".") for name in names)


def test_the_fingerprint_knows_packing_and_masks(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")

    def take(**changes: Any) -> dict[str, Any]:
        return blend_fingerprint(section(folder, **changes), seed=1, tokenizer=tokenizer)

    saved = take()
    check_fingerprint(saved, take())
    with pytest.raises(DataError, match=r"data\.packing: was 'best_fit', is 'in_order'"):
        check_fingerprint(saved, take(packing="in_order"))
    with pytest.raises(DataError, match=r"data\.document_mask: was True, is False"):
        check_fingerprint(saved, take(document_mask=False))
    older = {name: value for name, value in take(packing="none").items() if name not in ("packing", "document_mask")}
    check_fingerprint(older, take(packing="none"))


def test_a_missing_or_short_loss_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    mask = moved / "talks.loss.bin"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"talks\.loss\.bin: \d+ bytes, but .*talks\.bin holds \d+ tokens"):
        build(moved, 5)
    mask.unlink()
    assert build(moved, 5)[0]["loss_mask"].sum() > 0  # all tokens count without one
    tokenizer = load_tokenizer(moved / "tokenizer")
    made_with = {"path": "here", "sha256": tokenizer.sha256, "vocab": tokenizer.vocab_size}
    manifest = {"loss": {"bytes": 1, "sha256": "x"}, "tokenizer": made_with}
    (moved / "talks.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"talks\.loss\.bin: missing, but the manifest"):
        build(moved, 5)


def test_data_that_cannot_be_packed_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talks: \d+ of 200 documents are longer"):
        build(folder, 5, sequence_length=20)
    with PairWriter(tmp_path / "ends", np.dtype("<u2")) as writer:
        for _ in range(3):
            writer.add([0])
    with pytest.raises(DataError, match=r"ends: none of its 3 documents can be packed: .*3 of fewer than two tokens"):
        build(folder, 5, train=[{"path": tmp_path / "ends", "weight": 1}])
