"""SwiGLU that keeps only its input for backward. On CUDA it is a Triton kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class _SwiGLU(torch.autograd.Function):
    """Keeps [.., 2f] where autograd through Megatron's unfused path keeps [.., 4f] (silu's result, a copy of `up`)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if gate_up.is_cuda:
            from ouro_megatron.kernels import swiglu

            return swiglu.forward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if gate_up.is_cuda:
            from ouro_megatron.kernels import swiglu

            return swiglu.backward(d_out, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        # d silu(g) / d g = sigmoid(g) + silu(g) (1 - sigmoid(g))
        d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
        return torch.cat((d_gate, d_out * silu), dim=-1)


class SwiGLU(nn.Module):
    """silu(gate) * up from the stacked halves [gate, up] of the last dimension: [s, b, 2f] -> [s, b, f]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_up_sbf: Tensor) -> Tensor:
        return _SwiGLU.apply(gate_up_sbf)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Nothing to save; Megatron's MLP asks every part of it."""
        return {}
