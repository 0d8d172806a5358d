"""Attention core: torch's scaled_dot_product_attention behind Megatron-Core's interface, with a cache for decoding."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ouro_megatron.model.documents import DocumentBounds, document_attention


class CacheSlot(Protocol):
    """Keys and values of one (loop, layer): appends the new ones and returns all of them, plus what may be seen."""

    def extend(self, key_sbnd: Tensor, value_sbnd: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns all keys and values [total, b, n, d] and a bool mask [b, 1, s, total], or None for plain causal."""


@dataclass
class SlotHolder:
    """Where the model puts the cache slot for the layer call that follows; None while training."""

    slot: CacheSlot | None = None


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
        self.holder = SlotHolder()

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
        mask = attention_mask
        if self.holder.slot is not None:
            key, value, mask = self.holder.slot.extend(key, value)
        context_bnsd = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None and query.shape[0] > 1,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        s, b, n, d = query.shape
        return context_bnsd.permute(2, 0, 1, 3).reshape(s, b, n * d)


def rotary_embedding(positions_s: Tensor, dim: int, base: float) -> Tensor:
    """Angles for rotate-half RoPE, [s, 1, 1, dim] fp32 (positions [s]) or [s, b, 1, dim] (positions [s, b])."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions_s.device) / dim
    angles = positions_s.float()[..., None] / (base**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles[:, None, None, :] if positions_s.dim() == 1 else angles[:, :, None, :]
