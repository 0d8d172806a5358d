"""One tensor-parallel rank's weights as plain tensors, arranged for decoding.

Differences from the training layout: query, key and value rows follow each other (Megatron interleaves them by group),
and within each query and key head the two halves that RoPE rotates together are interleaved, which leaves their dot
products as they are and makes a rotation one complex multiplication.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_megatron.inference.linear import Linear
from ouro_megatron.model.config import head_dim
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.recipe.schema import ModelSection


@dataclass(frozen=True)
class LayerWeights:
    """f, n and g are this rank's shares of the feed-forward width, the heads and the key/value groups."""

    input_norm_h: Tensor
    qkv: Linear
    """[(n + 2g) d, h]: query heads, key heads, value heads."""
    out: Linear
    """[h, n d]"""
    post_attention_norm_h: Tensor
    mlp_norm_h: Tensor
    gate_up: Linear
    """[2f, h]: gate rows, then up rows."""
    down: Linear
    """[h, f]"""
    post_mlp_norm_h: Tensor


@dataclass(frozen=True)
class ModelWeights:
    """A rank's model: its shape, and tensors in `dtype` but for the gate, which is fp32."""

    model: ModelSection
    dtype: torch.dtype
    device: torch.device
    heads: int
    """Query heads of this rank."""
    groups: int
    """Key/value heads of this rank."""
    head_dim: int
    embedding_vh: Tensor
    """Rows [vocab_start, vocab_start + v) of the embedding."""
    vocab_start: int
    layers: list[LayerWeights]
    final_norm_h: Tensor
    gate_1h: Tensor
    gate_bias_1: Tensor
    head: Linear
    """[v, h]: the same rows of the vocabulary as the embedding's."""


def interleave_halves(weight: Tensor, dim: int) -> Tensor:
    """[heads * dim, h]: within each head, row j of the first half is followed by row j of the second."""
    whole = weight.shape[1]
    return weight.view(-1, 2, dim // 2, whole).transpose(1, 2).reshape(-1, whole)


def arrange_qkv(query: Tensor, key: Tensor, value: Tensor, dim: int) -> Tensor:
    """[n d, h], [g d, h], [g d, h] in rotate-half order -> the fused decode weight [(n + 2g) d, h]."""
    return torch.cat((interleave_halves(query, dim), interleave_halves(key, dim), value))


def split_megatron_qkv(weight: Tensor, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's fused rows (for each group: its queries, its key, its value) -> query, key and value rows."""
    hidden = weight.shape[1]
    grouped = weight.view(groups, -1, dim, hidden)
    query, key, value = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return query.reshape(-1, hidden), key.reshape(-1, hidden), value.reshape(-1, hidden)


@torch.no_grad()
def take_weights(lm: LoopLM, dtype: torch.dtype, sequences: int) -> ModelWeights:
    """Arranges a loaded model's tensors for decoding and empties the model: its parameters must not be used again.

    sequences: how many will run at one time, which decides the layout of the matrices. One layer at a time, so that
    the peak is the model plus one layer.
    """
    model, context = lm.model, lm.context
    dim = head_dim(model)
    groups = (model.kv_heads or model.heads) // context.tensor_size
    parameters = dict(lm.named_global_parameters())

    def take(name: str, wanted: torch.dtype = dtype) -> Tensor:
        parameter = parameters[name]
        tensor = parameter.detach().to(wanted)
        parameter.data = parameter.data.new_empty(0)
        return tensor

    def linear(weight: Tensor) -> Linear:
        return Linear(weight, sequences)

    layers = []
    for index in range(model.layers):
        prefix = f"decoder.layers.{index}."
        qkv = split_megatron_qkv(take(f"{prefix}self_attention.linear_qkv.weight"), groups, dim)
        layers.append(
            LayerWeights(
                input_norm_h=take(f"{prefix}input_layernorm.weight"),
                qkv=linear(arrange_qkv(*qkv, dim)),
                out=linear(take(f"{prefix}self_attention.linear_proj.weight")),
                post_attention_norm_h=take(f"{prefix}post_attention_norm.weight"),
                mlp_norm_h=take(f"{prefix}pre_mlp_layernorm.weight"),
                gate_up=linear(take(f"{prefix}mlp.linear_fc1.weight")),
                down=linear(take(f"{prefix}mlp.linear_fc2.weight")),
                post_mlp_norm_h=take(f"{prefix}post_mlp_norm.weight"),
            )
        )
    head = linear(take("output_layer.weight"))
    return _assemble(model, dtype, context.device, (context.tensor_rank, context.tensor_size), layers, head, take)


def _assemble(
    model: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    tensor: tuple[int, int],
    layers: list[LayerWeights],
    head: Linear,
    take: Callable[..., Tensor],
) -> ModelWeights:
    rank, size = tensor
    return ModelWeights(
        model=model,
        dtype=dtype,
        device=device,
        heads=model.heads // size,
        groups=(model.kv_heads or model.heads) // size,
        head_dim=head_dim(model),
        embedding_vh=take("embedding.word_embeddings.weight"),
        vocab_start=rank * (model.vocab // size),
        layers=layers,
        final_norm_h=take("decoder.final_layernorm.weight"),
        gate_1h=take("exit_gate.weight", torch.float32),
        gate_bias_1=take("exit_gate.bias", torch.float32),
        head=head,
    )
