"""Attention core: torch's scaled_dot_product_attention behind Megatron-Core's interface, for training and evaluation
(decoding has its own, in `inference`)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ouro_megatron.model.context_attention import ContextPart, context_attention
from ouro_megatron.model.documents import DocumentBounds, document_attention

ATTENTION_BLOCK = 64
"""Tokens of a block of cuDNN's attention."""


class ScaledDotProductAttention(MegatronModule):
    """Drop-in for Megatron's DotProductAttention: causal, grouped key/value heads, no dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        groups: ProcessGroupCollection | None = kwargs.get("pg_collection")
        self._context_group = None if groups is None else groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] (g divides n) -> context [s, b, n*d].

        `packed_seq_params`: DocumentBounds, when the documents of the batch must not see each other; ContextPart, when
        the sequence is cut over context-parallel ranks, whose s is their part of it.
        """
        if isinstance(packed_seq_params, ContextPart):
            assert self._context_group is not None
            return context_attention(query, key, value, packed_seq_params, self._context_group).flatten(2)
        if isinstance(packed_seq_params, DocumentBounds):
            return document_attention(query, key, value, packed_seq_params).flatten(2)
        return causal_attention(query, key, value, attention_mask)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query [s, b, n, d], key and value [s, b, g, d] -> context [s, b, n*d]; causal unless there is a mask."""
    with _kernels(query):
        context_bnsd = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and query.shape[0] > 1,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return context_bnsd.permute(2, 0, 1, 3).flatten(2)


def _kernels(query: Tensor) -> AbstractContextManager[None]:
    """The order of preference on CUDA in half precision. Where a kernel cannot serve, torch goes on down the list."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    kernels: AbstractContextManager[None] = sdpa_kernel(kernel_order(query.shape[0]), set_priority=True)
    return kernels


def kernel_order(length: int) -> list[SDPBackend]:
    """cuDNN's kernel before torch's flash attention, of whose time it takes half on Hopper (docs/results/gpu.md).

    Not for a length that its blocks do not fill: recorded in a CUDA graph, the backward of 32 tokens read memory that
    was not its own.
    """
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return others if length % ATTENTION_BLOCK else [SDPBackend.CUDNN_ATTENTION, *others]


def transformer_engine_core(attention: type) -> type:
    """Transformer Engine's attention core of Megatron (`TEDotProductAttention`), taught what this project asks of it.

    Documents go to it end to end with their bounds ("thd"), a sequence cut over ranks as it is. Whole rows on one rank
    go to torch instead: the same kernel of cuDNN's, with a third of a millisecond less Python around it a visit, which
    is what holds up FP8 (docs/results/gpu.md).
    """

    class Core(attention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any,
            attention_bias: Tensor | None = None,
            packed_seq_params: Any = None,
        ) -> Tensor:
            if packed_seq_params is None and self.config.context_parallel_size == 1:
                return causal_attention(query, key, value, attention_mask)
            if not isinstance(packed_seq_params, DocumentBounds):
                return super().forward(
                    query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
                )
            s, b = query.shape[:2]
            bounds, longest = packed_seq_params.cu_seqlens, packed_seq_params.longest
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            parts = (x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value))
            context = super().forward(*parts, attention_mask, attn_mask_type, attention_bias, packed)
            return context.reshape(b, s, -1).transpose(0, 1).contiguous()

    return Core


def rotary_embedding(positions_s: Tensor, dim: int, base: float) -> Tensor:
    """Angles for rotate-half RoPE, [s, 1, 1, dim] fp32 (positions [s]) or [s, b, 1, dim] (positions [s, b])."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_s.device) / dim
    angles = positions_s.float()[..., None] / (base**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles[:, None, None, :] if positions_s.dim() == 1 else angles[:, :, None, :]
