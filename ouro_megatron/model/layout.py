"""How each parameter is cut over tensor-parallel ranks, in one table.

Used to draw the same initial weights at any layout, and by tests to put whole tensors together again.
"""

from enum import Enum

import torch
from torch import Tensor


class Split(Enum):
    WHOLE = "whole"
    """Every rank holds all of it."""
    ROWS = "rows"
    """Cut along dimension 0."""
    COLUMNS = "columns"
    """Cut along dimension 1."""
    ROW_PAIRS = "row_pairs"
    """Two stacked matrices (SwiGLU's gate and up), each cut along dimension 0."""


_BY_SUFFIX = {
    "embedding.word_embeddings.weight": Split.ROWS,
    "output_layer.weight": Split.ROWS,
    "self_attention.linear_qkv.weight": Split.ROWS,
    "self_attention.linear_proj.weight": Split.COLUMNS,
    "mlp.linear_fc1.weight": Split.ROW_PAIRS,
    "mlp.linear_fc2.weight": Split.COLUMNS,
    "norm.weight": Split.WHOLE,
    "layernorm.weight": Split.WHOLE,
    "exit_gate.weight": Split.WHOLE,
    "exit_gate.bias": Split.WHOLE,
}


def split_of(name: str) -> Split:
    """The cut of the parameter called `name`. Raises KeyError for a name this model does not have."""
    for suffix, split in _BY_SUFFIX.items():
        if name.endswith(suffix):
            return split
    raise KeyError(f"no tensor-parallel layout is known for parameter {name!r}")


def take_shard(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """Rank `rank` of `size`'s part of a whole parameter."""
    match split_of(name):
        case Split.WHOLE:
            return whole
        case Split.ROWS:
            return whole.chunk(size, dim=0)[rank]
        case Split.COLUMNS:
            return whole.chunk(size, dim=1)[rank]
        case Split.ROW_PAIRS:
            gate, up = whole.chunk(2, dim=0)
            return torch.cat((gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]))


def join_shards(name: str, shards: list[Tensor]) -> Tensor:
    """The inverse of `take_shard` over all ranks, in rank order."""
    match split_of(name):
        case Split.WHOLE:
            return shards[0]
        case Split.ROWS:
            return torch.cat(shards, dim=0)
        case Split.COLUMNS:
            return torch.cat(shards, dim=1)
        case Split.ROW_PAIRS:
            pairs = [shard.chunk(2, dim=0) for shard in shards]
            return torch.cat([gate for gate, _ in pairs] + [up for _, up in pairs])


def whole_shape(name: str, shard: Tensor, size: int) -> tuple[int, ...]:
    """Shape of the parameter before it was cut over `size` ranks."""
    shape = list(shard.shape)
    match split_of(name):
        case Split.ROWS | Split.ROW_PAIRS:
            shape[0] *= size
        case Split.COLUMNS:
            shape[1] *= size
        case Split.WHOLE:
            pass
    return tuple(shape)
