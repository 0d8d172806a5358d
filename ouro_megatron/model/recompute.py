"""Selective recomputation: cheap results that a matrix product would keep for backward are made again instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Again:
    """Stands in a graph for a tensor that is made again when backward asks for it."""

    make: Callable[[], Tensor]
    shape: torch.Size


@contextmanager
def not_kept(result: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """What operations inside the block save of `result` is dropped; backward calls `make` for the same values.

    `make` must be a deterministic function of tensors that are kept anyway; it runs without a graph. Other tensors
    saved inside the block are untouched, and so is `result` itself for whoever else holds it.
    """
    # The hooks live as long as the graph: they must not hold the result itself.
    address, count = result.untyped_storage().data_ptr(), result.numel()

    def pack(saved: Tensor) -> Tensor | _Again:
        is_result = saved.untyped_storage().data_ptr() == address and saved.numel() == count
        return _Again(make, saved.shape) if is_result else saved

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept.make().view(kept.shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
