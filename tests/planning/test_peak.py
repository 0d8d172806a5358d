"""The planner's peak against the bytes of the tensors that live while real ranks train two steps.

Counted by allocation, so the numbers are the same in every run; `python -m benchmarks.memory` compares whole processes.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import layout_on, parallel_section, train
from ouro_megatron.parallel.context import create_context
from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.memory import rank_memory
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


class LivePeak(TorchDispatchMode):
    """The most bytes that the storages made by operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        if self._at_most > self.peak:  # only now is it worth looking which of them are gone
            self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
            self._at_most = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._at_most)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        reference = StorageWeakRef(storage)
        known = self._alive.get(reference.cdata)
        if known is None or known[0].expired():
            self._alive[reference.cdata] = (reference, storage.nbytes())
            self._at_most += storage.nbytes()


def live_peak(layout: Layout) -> tuple[int, int]:
    """Runs on every rank: its pipeline position and the most bytes it held."""
    context = create_context(parallel_section(layout), "cpu")
    try:
        with LivePeak() as live:
            train(layout, context)
        return context.pipeline_rank, live.peak
    finally:
        context.close()


SMALL = layout_on("cpu", sequence=256, microbatch=2)
SMALL = replace(SMALL, model=SMALL.model.model_copy(update={"hidden": 128, "ffn": 352, "vocab": 2048}))


@pytest.mark.parametrize(
    "layout",
    [
        SMALL,
        replace(SMALL, bytes_per_value=2, recompute="full", recompute_loops=2),
        replace(SMALL, pipeline=2, layers=(3, 3), microbatches=4, recompute="selective"),
        replace(SMALL, context=2, sequence=512),
    ],
    ids=lambda layout: f"{layout.describe()}, {layout.recompute}",
)
def test_peak_of_a_rank_is_within_a_tenth(layout: Layout) -> None:
    for pipeline_rank, measured in run_ranks(live_peak, layout.world, layout):
        assert measured == pytest.approx(rank_memory(layout, pipeline_rank).peak, rel=0.1)
