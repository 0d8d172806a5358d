"""From .bin/.idx pairs to training samples, put together so that sample k stays sample k.

Megatron builds one index for all epochs of a source at once, so asking for more samples reorders those already seen.
Here every epoch of a source is a GPTDataset of its own, seeded by (seed, source, epoch). With Megatron's blending,
whose choices depend on earlier choices only, sample k is a function of (sources and weights, seed, sequence length, k):
a run that is made longer sees the same samples up to its old end. The price: the last, partial sample of each epoch is
dropped.

A source is either a stream, cut every sequence length, or packed (`packing.py`): one plan says which documents
lie together, and each epoch reads its sequences in a new order.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ouro_megatron.data.epochs import Epochs, PackedEpoch, SampleForm, StreamEpoch
from ouro_megatron.data.indexed import (
    MAX_BLEND,
    MAX_SEQUENCES,
    PrefixInfo,
    check_prefix,
    read_manifest,
    sha256_of,
    with_suffix,
)
from ouro_megatron.data.packing import VERSION, PackingReport
from ouro_megatron.data.plans import PackingPlan, write_plan
from ouro_megatron.data.quiet import quiet_megatron
from ouro_megatron.data.ranks import agree, from_rank_zero, on_rank_zero, world_size
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.data.tokens import TokenReader, check_loss_mask
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry, DataSection

if TYPE_CHECKING:
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

T = TypeVar("T")

SPLITS = {"train": "train", "validation": "valid"}
"""Our names of the splits -> Megatron's."""


_AT_ONCE = 2**24
"""Samples whose sources are counted at one time."""


class SampleDataset(Dataset[dict[str, torch.Tensor]]):
    """`samples` samples of a blend. Item k: tokens int64[s], labels int64[s], loss_mask float32[s], and under a
    document mask positions int64[s], 0 where a document begins.

    Raises DataError for a token beyond `vocab`: a damaged page of a .bin file would otherwise train, or end the process
    in the middle of a device's kernel.
    """

    def __init__(
        self,
        blend: "BlendedDataset",
        names: Sequence[str],
        infos: Sequence[PrefixInfo],
        vocab: int,
        packing: Sequence[PackingReport] = (),
    ) -> None:
        self._blend = blend
        self._vocab = vocab
        self.names = list(names)
        self.infos = list(infos)
        self.packing = list(packing)
        """Of each source, when it is packed."""

    def __len__(self) -> int:
        return len(self._blend)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}: the run asked for fewer samples than it reads")
        item = self._blend[k]
        largest = max(int(item["tokens"].max()), int(item["labels"].max()))
        if largest >= self._vocab:
            raise DataError(
                f"sample {k} holds token {largest}, the vocabulary ends at {self._vocab - 1}: the .bin file of source "
                f"{self.source_of(k)!r} has been damaged. Check it with `ouro data verify` and copy it again"
            )
        return {name: tensor for name, tensor in item.items() if isinstance(tensor, torch.Tensor)}

    def source_of(self, k: int) -> str:
        """Name of the source that sample k comes from."""
        return self.names[int(self._blend.dataset_index[k])]

    def source_counts(self, start: int, end: int) -> dict[str, int]:
        """Samples of [start, end) by source; sources of the same name are added up."""
        taken = np.zeros(len(self.names), dtype=np.int64)
        for first in range(start, end, _AT_ONCE):  # counting widens the index's small integers: not all at once
            part = np.asarray(self._blend.dataset_index[first : min(end, first + _AT_ONCE)])
            taken += np.bincount(part, minlength=len(self.names))
        counts: dict[str, int] = {}
        for name, count in zip(self.names, taken, strict=True):
            counts[name] = counts.get(name, 0) + int(count)
        return counts

    def counts(self) -> dict[str, int]:
        """Samples taken from each source."""
        taken = np.bincount(np.asarray(self._blend.dataset_index), minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, taken, strict=True)}


@dataclass(frozen=True)
class _Request:
    """All that one `build_dataset` call needs; the same on every rank."""

    entries: tuple[BlendEntry, ...]
    infos: tuple[PrefixInfo, ...]
    identities: tuple[str, ...]
    settings: DataSection
    samples: int
    seed: int
    tokenizer: TextTokenizer
    split: str

    @property
    def form(self) -> SampleForm:
        return SampleForm(
            sequence_length=self.settings.sequence_length,
            end_of_document=self.tokenizer.eod,
            mask_end_of_document=self.settings.mask_end_of_document,
            document_mask=self.settings.masks_documents,
        )


def build_dataset(
    settings: DataSection,
    *,
    samples: int,
    seed: int,
    tokenizer: TextTokenizer,
    cache: Path | None,
    split_name: str,
) -> SampleDataset:
    """The first `samples` samples of the blend `settings.train` or `settings.validation`, in the order `seed` fixes.

    Sample k depends on the content and order of the blend, its weights, the sequence length, the packing, `seed` and k;
    not on `samples`, the paths or the number of ranks. `split_name`: "train" or "validation".

    With torch.distributed initialised this is collective over the default group: rank 0 builds the index files under
    `cache`, which every node must see (a shared file system), then all ranks map them. A failure on any rank raises
    DataError on all of them. `cache=None` keeps the indices in memory and works in a single process only.
    """
    if split_name not in SPLITS:
        raise ValueError(f"split_name {split_name!r}: expected one of {', '.join(SPLITS)}")
    if samples < 1:
        raise DataError(f"{split_name} data: {samples} samples asked for, at least 1 is needed.")
    if cache is None and world_size() > 1:
        raise DataError("data.cache: several ranks need a folder for the sample indices that all of them can read.")
    entries = settings.train if split_name == "train" else settings.validation
    if len(entries) > MAX_BLEND:
        raise DataError(f"{split_name} data: {len(entries):,} pairs; a blend holds {MAX_BLEND:,} at most.")

    def prepare() -> tuple[tuple[PrefixInfo, ...], tuple[str, ...]]:
        infos = tuple(_check_entry(entry, tokenizer, settings) for entry in entries)
        return infos, tuple(_identity(info) for info in infos)

    infos, identities = from_rank_zero(prepare)
    request = _Request(tuple(entries), infos, identities, settings, samples, seed, tokenizer, SPLITS[split_name])
    with quiet_megatron():
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="ouro-indices-") as folder:
                blend, reports = _build(request, Path(folder), keep=False)
        else:
            on_rank_zero(lambda: _build(request, cache, keep=True))
            blend, reports = agree(lambda: _build(request, cache, keep=True), "reading the sample indices")
    names = [entry.name or entry.path.name for entry in entries]
    return SampleDataset(blend, names, infos, tokenizer.vocab_size, reports)


def _check_entry(entry: BlendEntry, tokenizer: TextTokenizer, settings: DataSection) -> PrefixInfo:
    sequence_length = settings.sequence_length
    manifest = read_manifest(entry.path)
    if manifest is not None and manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise DataError(
            f"{entry.path}: tokenised with {manifest['tokenizer']['path']}, which is not the tokenizer at "
            f"{tokenizer.path} (other content). Set data.tokenizer to the former, or prepare the data again."
        )
    info = check_prefix(entry.path, tokenizer.vocab_size)
    check_loss_mask(entry.path, info.tokens)
    if settings.packing == "none" and info.tokens <= sequence_length:
        raise DataError(
            f"{entry.path}: {info.tokens} tokens do not fill one sample of data.sequence_length + 1 = "
            f"{sequence_length + 1}. Prepare more data or shorten the sequence."
        )
    if info.sequences > MAX_SEQUENCES:
        raise DataError(
            f"{entry.path}: {info.sequences:,} sequences; Megatron's document index holds {MAX_SEQUENCES:,} at most."
        )
    return info


def _identity(info: PrefixInfo) -> str:
    """Short name of the content, for cache keys: data made anew at the same path must not meet old indices."""
    digest = hashlib.sha256(f"{info.dtype}:{info.bin_bytes}:{info.idx_bytes}:".encode())
    digest.update(sha256_of(with_suffix(info.prefix, ".idx")).encode())
    return digest.hexdigest()[:20]


def _build(request: _Request, cache: Path, *, keep: bool) -> tuple["BlendedDataset", list[PackingReport]]:
    from megatron.core.datasets.blended_dataset import BlendedDataset

    total = sum(entry.share for entry in request.entries)
    weights = [entry.share / total for entry in request.entries]
    # Megatron's blending takes at most floor(weight * samples) + 1 from a source: it always serves the largest deficit.
    sources: list[Epochs] = []
    reports: list[PackingReport] = []
    for number, weight in enumerate(weights):
        needed = math.floor(weight * request.samples) + 2
        if request.settings.packing == "none":
            sources.append(_stream_epochs(request, number, needed, cache, keep=keep))
        else:
            plan, epochs = _packed_epochs(request, number, needed, cache)
            sources.append(epochs)
            reports.append(plan.report)
    key = _key(request, *request.identities, str(weights), str(request.samples))

    def build(folder: Path | None) -> "BlendedDataset":
        return BlendedDataset(sources, list(weights), request.samples, _config(request, request.seed, folder))

    # BlendedDataset reads and writes its cache only under torch.distributed; without it the index is built in memory.
    if not keep or not torch.distributed.is_initialized():
        return build(None), reports
    return _cached(cache / f"blend-{key}", build), reports


def _stream_epochs(request: _Request, number: int, needed: int, cache: Path, *, keep: bool) -> Epochs:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    info, identity = request.infos[number], request.identities[number]
    per_epoch = (info.tokens - 1) // request.settings.sequence_length
    indexed = IndexedDataset(str(info.prefix), multimodal=False, mmap=True)
    sequences = np.arange(info.sequences, dtype=np.int32)
    reader = TokenReader(info.prefix)

    def epoch(seed: int) -> StreamEpoch:
        def build(folder: Path | None) -> GPTDataset:
            # The identity stands for the path: it enters Megatron's key, which must not see where the data lies.
            config = _config(request, seed, folder)
            return GPTDataset(indexed, identity, sequences, None, Split[request.split], config)

        name = f"source-{_key(request, identity, str(seed))}"
        indices = _cached(cache / name, build) if keep else build(cache / name)
        return StreamEpoch(indices, reader, request.form)

    epochs = [epoch(_epoch_seed(request.seed, number, index)) for index in range(-(-needed // per_epoch))]
    return Epochs(epochs, identity)


def _packed_epochs(request: _Request, number: int, needed: int, cache: Path) -> tuple[PackingPlan, Epochs]:
    from megatron.core.datasets.utils import Split

    info, identity, settings = request.infos[number], request.identities[number], request.settings
    reader = TokenReader(info.prefix)

    def build_plan(folder: Path) -> PackingPlan:
        if not any(folder.iterdir()):
            assert settings.packing != "none"
            try:
                write_plan(folder, reader.lengths, settings.sequence_length, settings.packing, settings.long_documents)
            except DataError as error:
                raise DataError(f"{info.prefix}: {error}") from error
        return PackingPlan(folder)

    plan = _cached(cache / f"packing-{packing_key(settings, identity)}", build_plan)

    def epoch(seed: int) -> PackedEpoch:
        def build(folder: Path) -> np.ndarray:
            file = folder / "shuffle.npy"
            if not file.exists():
                # numpy promises the results of RandomState for ever, of its newer generators not.
                np.save(file, np.random.RandomState(seed).permutation(len(plan)))
            return np.load(file, mmap_mode="r")

        key = _key(request, identity, str(seed), packing_key(settings, identity))
        shuffle = _cached(cache / f"source-{key}", build)
        return PackedEpoch(plan, shuffle, reader, request.form, Split[request.split], f"{identity}-{seed}")

    epochs = [epoch(_epoch_seed(request.seed, number, index)) for index in range(-(-needed // len(plan)))]
    return plan, Epochs(epochs, identity)


def packing_key(settings: DataSection, identity: str) -> str:
    """Names a plan: all that decides which documents lie together."""
    parts = (identity, settings.packing, settings.sequence_length, settings.long_documents, VERSION)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]


def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    """Seed of numpy's RandomState, below 2^32."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()[:4], "little")


def _key(request: _Request, *parts: str) -> str:
    settings = request.settings
    text = "\n".join([request.split, str(settings.sequence_length), str(request.seed), settings.packing, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _config(request: _Request, seed: int, folder: Path | None) -> "GPTDatasetConfig":
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    prefixes = [str(info.prefix) for info in request.infos]
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=request.settings.sequence_length,
        blend_per_split=[(prefixes, None), None, None],
        path_to_cache=None if folder is None else str(folder),
        tokenizer=request.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _cached(folder: Path, build: Callable[[Path], T]) -> T:
    """Builds into a temporary folder that takes its name when whole; then opens it, memory-mapped.

    Megatron writes its index files in place: a process killed half-way would leave a short one that is trusted later.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(partial)
            partial.chmod(0o755)  # mkdtemp's is for its owner only; a cache may be shared
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if not folder.exists():  # else another process was first, and its files are the same
                raise
    return build(folder)
