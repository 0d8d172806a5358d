"""One epoch of one source as samples of a fixed length: a stream that is cut, or packed documents."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ouro_megatron.data.plans import PackingPlan
from ouro_megatron.data.tokens import Stretch, TokenReader

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleForm:
    """What samples of a data set look like."""

    sequence_length: int
    end_of_document: int
    mask_end_of_document: bool
    """Leave the label after an end-of-document token out."""
    document_mask: bool
    """Documents do not see each other: samples have `positions`, and no label is another document's first token."""


class StreamEpoch(Dataset[Sample]):
    """Documents one after the other, cut every `sequence_length` tokens; Megatron's indices say where."""

    def __init__(self, indices: "GPTDataset", reader: TokenReader, form: SampleForm) -> None:
        self._indices = indices
        self._reader = reader
        self._form = form
        self.index_split = indices.index_split
        self.unique_identifiers = indices.unique_identifiers

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        stretches = self._stretches(int(index))
        ids, counts = self._reader.read(stretches)
        positions, mask = None, counts[1:]
        if self._form.document_mask:
            lengths = [stretch.length for stretch in stretches]
            positions = positions_of(lengths)[:-1]
            starts = np.cumsum(lengths[:-1], dtype=np.int64)
            mask = mask.copy()
            mask[starts - 1] = False
        return _sample(self._form, ids[:-1], ids[1:], mask, positions)

    def _stretches(self, index: int) -> list[Stretch]:
        """The sequences that sample `index` is made of: sequence_length + 1 tokens, none empty."""
        indices = self._indices
        number = int(indices.shuffle_index[index])
        (first, begin), (last, end) = (indices.sample_index[number + k].tolist() for k in (0, 1))
        parts = []
        for place in range(first, last + 1):
            sequence = int(indices.document_index[place])
            start = begin if place == first else 0
            stop = end + 1 if place == last else int(self._reader.lengths[sequence])
            if stop > start:
                parts.append(Stretch(sequence, start, stop - start))
        return parts


class PackedEpoch(Dataset[Sample]):
    """Whole documents, as a plan puts them together, in the order of `shuffle`; the rest of a sample is padding."""

    def __init__(
        self, plan: PackingPlan, shuffle: np.ndarray, reader: TokenReader, form: SampleForm, split: Any, identity: str
    ) -> None:
        self._plan = plan
        self._shuffle = shuffle
        self._reader = reader
        self._form = form
        self.index_split = split
        self.unique_identifiers = OrderedDict(identity=identity)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Sample:
        length, fill = self._form.sequence_length, self._form.end_of_document
        stretches = self._plan.stretches(int(self._shuffle[index]))
        ids, counts = self._reader.read(stretches)
        # Each document gives all but its last token as inputs, all but its first as labels.
        ends = np.cumsum([stretch.length for stretch in stretches])
        is_input, is_label = np.ones(len(ids), bool), np.ones(len(ids), bool)
        is_input[ends - 1] = False
        is_label[np.concatenate(([0], ends[:-1]))] = False
        used = int(is_input.sum())
        tokens, labels = np.full(length, fill, np.int64), np.full(length, fill, np.int64)
        mask = np.zeros(length, bool)
        tokens[:used], labels[:used], mask[:used] = ids[is_input], ids[is_label], counts[is_label]
        positions = None
        if self._form.document_mask:
            positions = positions_of([*(stretch.length - 1 for stretch in stretches), length - used])
        return _sample(self._form, tokens, labels, mask, positions)


class Epochs(Dataset[Sample]):
    """Epochs of one source, one after the other; has what Megatron's BlendedDataset asks of a data set."""

    def __init__(self, epochs: list[StreamEpoch] | list[PackedEpoch], identity: str) -> None:
        self.epochs = epochs
        self.per_epoch = len(epochs[0])
        self.index_split = epochs[0].index_split
        self.unique_identifiers = OrderedDict(
            identity=identity, epochs=[epoch.unique_identifiers for epoch in self.epochs]
        )

    def __len__(self) -> int:
        return len(self.epochs) * self.per_epoch

    def __getitem__(self, index: int) -> Sample:
        epoch, sample = divmod(int(index), self.per_epoch)
        return self.epochs[epoch][sample]


def positions_of(lengths: Sequence[int]) -> np.ndarray:
    """int64: 0, 1, .. for each document in turn; empty ones give nothing."""
    starts = [0, *itertools.accumulate(lengths)]
    return np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)


def _sample(
    form: SampleForm, tokens: np.ndarray, labels: np.ndarray, mask: np.ndarray, positions: np.ndarray | None
) -> Sample:
    if form.mask_end_of_document:
        mask = mask & (tokens != form.end_of_document)
    sample = {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask.astype(np.float32)),
    }
    if positions is not None:
        sample["positions"] = torch.from_numpy(positions)
    return sample
