"""What a CUDA graph does, on a CPU: operations are noted as they run and repeated later on the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuGraph:
    """Repeats noted operations; each result is written to where the first one lies, as on a GPU."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operation, arguments, keywords, results in self.operations:
            again = tree_leaves(operation(*arguments, **keywords))
            for kept, new in zip(results, (x for x in again if isinstance(x, Tensor)), strict=True):
                if kept.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    kept.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._graph.operations.append((func, args, kwargs or {}, tensors))
        return result


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        """One thread does one thing after the other."""


@contextmanager
def _recording(graph: CpuGraph, **_: Any) -> Iterator[None]:
    with _Noting(graph):
        yield


def record_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("CUDAGraph", CpuGraph),
        ("graph", _recording),
        ("graph_pool_handle", lambda: None),
        ("Stream", _Stream),
        ("current_stream", _Stream),
        ("stream", lambda _: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
