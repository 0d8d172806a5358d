"""Attention core: torch's scaled_dot_product_attention behind Megatron-Core's interface, for training and evaluation
(decoding has its own, in `inference`)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ouro_megatron.model.documents import DocumentBounds, document_attention


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

        `packed_seq_params`: DocumentBounds, when the documents of the batch must not see each other.
        """
        if isinstance(packed_seq_params, DocumentBounds):
            return document_attention(query, key, value, packed_seq_params).flatten(2)
        with _kernels(query):
            context_bnsd = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=attention_mask,
                is_causal=attention_mask is None and query.shape[0] > 1,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        s, b, n, d = query.shape
        return context_bnsd.permute(2, 0, 1, 3).reshape(s, b, n * d)


def _kernels(query: Tensor) -> AbstractContextManager[None]:
    """On CUDA in half precision cuDNN's kernel before torch's flash attention: on Hopper it takes half of the time
    (docs/results/gpu.md). Where it cannot serve, a deterministic backward pass for one, torch goes on down the list.
    """
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    kernels: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return kernels


def rotary_embedding(positions_s: Tensor, dim: int, base: float) -> Tensor:
    """Angles for rotate-half RoPE, [s, 1, 1, dim] fp32 (positions [s]) or [s, b, 1, dim] (positions [s, b])."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_s.device) / dim
    angles = positions_s.float()[..., None] / (base**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles[:, None, None, :] if positions_s.dim() == 1 else angles[:, :, None, :]
