"""The published tensor names and shapes, and how this project's fused tensors are made of them.

Published (ByteDance/Ouro-1.4B and its family, and the loaders that read them): separate q, k, v and gate, up matrices.
Here: one query-key-value matrix in Megatron's order (per key/value head: its queries, its key, its value) and one
[gate; up] matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ouro_megatron.model.config import head_dim
from ouro_megatron.recipe.schema import ModelSection

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorGroup:
    """One tensor of this project and the published tensors it holds."""

    ours: str
    """Global parameter name, as in a checkpoint without the `weight.` in front."""
    published: dict[str, Shape]
    """Name -> shape, in the order in which `ours` holds them."""
    kind: Literal["same", "stacked", "qkv"]
    kv_heads: int = 1

    @property
    def shape(self) -> Shape:
        """Shape of `ours`."""
        rows = sum(shape[0] for shape in self.published.values())
        return (rows, *next(iter(self.published.values()))[1:])

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The published tensors in `tensor` (of `self.shape`); contiguous or views."""
        rows = [shape[0] for shape in self.published.values()]
        if self.kind != "qkv":
            return dict(zip(self.published, tensor.split(rows), strict=True))
        heads = tensor.view(self.kv_heads, -1, tensor.shape[1])
        parts = heads.split([count // self.kv_heads for count in rows], dim=1)
        return {name: part.reshape(-1, tensor.shape[1]) for name, part in zip(self.published, parts, strict=True)}

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        parts = [tensors[name] for name in self.published]
        if self.kind == "same":
            return parts[0]
        if self.kind == "stacked":
            return torch.cat(parts)
        hidden = parts[0].shape[1]
        heads = torch.cat([part.reshape(self.kv_heads, -1, hidden) for part in parts], dim=1)
        return heads.reshape(-1, hidden)


def tensor_groups(model: ModelSection) -> Iterator[TensorGroup]:
    """All tensors of a model, in the order of the forward pass."""
    hidden, wide = model.hidden, model.ffn
    kv_heads, size = model.kv_heads or model.heads, head_dim(model)
    queries, keys = model.heads * size, kv_heads * size
    yield _same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (model.vocab, hidden))
    for index in range(model.layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{index}."
        yield _same(ours + "input_layernorm.weight", theirs + "input_layernorm.weight", (hidden,))
        attention = theirs + "self_attn."
        yield TensorGroup(
            ours + "self_attention.linear_qkv.weight",
            {
                attention + "q_proj.weight": (queries, hidden),
                attention + "k_proj.weight": (keys, hidden),
                attention + "v_proj.weight": (keys, hidden),
            },
            "qkv",
            kv_heads,
        )
        yield _same(ours + "self_attention.linear_proj.weight", attention + "o_proj.weight", (hidden, queries))
        yield _same(ours + "post_attention_norm.weight", theirs + "input_layernorm_2.weight", (hidden,))
        yield _same(ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight", (hidden,))
        yield TensorGroup(
            ours + "mlp.linear_fc1.weight",
            {theirs + "mlp.gate_proj.weight": (wide, hidden), theirs + "mlp.up_proj.weight": (wide, hidden)},
            "stacked",
        )
        yield _same(ours + "mlp.linear_fc2.weight", theirs + "mlp.down_proj.weight", (hidden, wide))
        yield _same(ours + "post_mlp_norm.weight", theirs + "post_attention_layernorm_2.weight", (hidden,))
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    yield _same("exit_gate.weight", "model.early_exit_gate.weight", (1, hidden))
    yield _same("exit_gate.bias", "model.early_exit_gate.bias", (1,))
    yield _same("output_layer.weight", "lm_head.weight", (model.vocab, hidden))


def published_shapes(model: ModelSection) -> dict[str, Shape]:
    """Every tensor of the published layout, in order."""
    return {name: shape for group in tensor_groups(model) for name, shape in group.published.items()}


def _same(ours: str, theirs: str, shape: Shape) -> TensorGroup:
    return TensorGroup(ours, {theirs: shape}, "same")
