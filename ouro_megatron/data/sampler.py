"""Which samples a step reads, and reading them.

The only state is the number of samples consumed so far. A global batch is samples [consumed, consumed + global_batch)
whatever the number of ranks; the ranks share it out between them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from ouro_megatron.data.packing import PackingReport
from ouro_megatron.errors import DataError

Batch = dict[str, torch.Tensor]
ON_CPU = ("positions_bs",)


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Shares global batches out over the data-parallel ranks, `microbatch` sequences at a time."""

    microbatch: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        if self.microbatch < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"microbatch {self.microbatch}, rank {self.dp_rank} of {self.dp_size}: out of range")

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of this rank in a step of `global_batch` sequences. Raises DataError if they do not divide."""
        at_once = self.microbatch * self.dp_size
        if global_batch < 1 or global_batch % at_once:
            raise DataError(
                f"batch: {global_batch} sequences a step are not a multiple of microbatch {self.microbatch} x "
                f"{self.dp_size} data-parallel ranks. Change batch.global_tokens or batch.microbatch."
            )
        return global_batch // at_once

    def indices(self, consumed: int, global_batch: int) -> list[list[int]]:
        """Sample numbers of each of this rank's microbatches for the step that starts after `consumed` samples.

        Together, the ranks read [consumed, consumed + global_batch), each sample once.
        """
        count = self.microbatches(global_batch)
        starts = [consumed + (i * self.dp_size + self.dp_rank) * self.microbatch for i in range(count)]
        return [list(range(start, start + self.microbatch)) for start in starts]


class MicrobatchReader:
    """Reads microbatches on a thread, a few ahead of the step that uses them, across step boundaries too.

    A step's tensors: tokens_bs int64[b, s], labels_bs int64[b, s], loss_mask_bs float32[b, s] on `device`; of a data
    set with a document mask also positions_bs int64[b, s], which stays on the CPU: bounds are counted there.
    """

    def __init__(
        self, dataset: Dataset[Batch], sampler: GlobalBatchSampler, device: torch.device, *, ahead: int = 2
    ) -> None:
        self._dataset = dataset
        self._length = len(dataset)  # type: ignore[arg-type]
        self._sampler = sampler
        self._device = device
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="microbatches")
        self._pending: dict[tuple[int, ...], Future[Batch]] = {}

    def step(self, consumed: int, global_batch: int) -> Iterator[Batch]:
        """The microbatches of one step, in order. Raises DataError when the dataset ends before the batch does."""
        wanted = [tuple(item) for item in self._sampler.indices(consumed, global_batch)]
        if consumed < 0 or consumed + global_batch > self._length:
            raise DataError(
                f"samples {consumed} to {consumed + global_batch} of a dataset of {self._length}: the run is longer "
                "than the data was built for. Build it for the whole budget."
            )
        return self._read(wanted, self._guess_next(consumed + global_batch, global_batch))

    def source_counts(self, start: int, end: int) -> dict[str, int]:
        """Samples [start, end) by source of the blend; empty when the dataset cannot tell."""
        counts = getattr(self._dataset, "source_counts", None)
        return counts(start, end) if counts is not None else {}

    def packing(self) -> dict[str, PackingReport]:
        """By source: how its documents were packed. Empty when they are a stream or the dataset cannot tell."""
        return dict(zip(getattr(self._dataset, "names", ()), getattr(self._dataset, "packing", ()), strict=False))

    def close(self) -> None:
        """Ends the reading thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _guess_next(self, consumed: int, global_batch: int) -> list[tuple[int, ...]]:
        """What the next step most likely starts with; a wrong guess costs a little reading and nothing else."""
        if consumed + global_batch > self._length:
            return []
        return [tuple(item) for item in self._sampler.indices(consumed, global_batch)[: self._ahead]]

    def _read(self, wanted: Sequence[tuple[int, ...]], following: Sequence[tuple[int, ...]]) -> Iterator[Batch]:
        queue = [*wanted, *following]
        stale = [key for key in self._pending if key not in wanted[: self._ahead]]
        for key in stale:
            self._pending.pop(key).cancel()
        for position, key in enumerate(wanted):
            for coming in queue[position : position + 1 + self._ahead]:
                if coming not in self._pending:
                    self._pending[coming] = self._pool.submit(self._load, coming)
            batch = self._pending.pop(key).result()
            yield {
                name: tensor if name in ON_CPU else tensor.to(self._device, non_blocking=True)
                for name, tensor in batch.items()
            }

    def _load(self, indices: tuple[int, ...]) -> Batch:
        items = [self._dataset[index] for index in indices]
        batch = {f"{name}_bs": torch.stack([item[name] for item in items]) for name in items[0]}
        if self._device.type == "cuda":
            batch = {name: tensor if name in ON_CPU else tensor.pin_memory() for name, tensor in batch.items()}
        return batch
