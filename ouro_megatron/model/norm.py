"""RMSNorm that works under sequence parallelism and keeps little for backward. On CUDA it is a Triton kernel."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a token; what lies between is computed again in backward.

    Autograd alone would keep two fp32 copies of every normed activation: with four norms a layer and T visits that is
    the largest part of a looped model's activations in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_h: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        if x.is_cuda:
            from ouro_megatron.kernels import rms_norm

            y, scale = rms_norm.forward(x, weight_h, eps, residual)
            ctx.save_for_backward(x, weight_h, scale)
            return y
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_h, scale)
        y = (wide * scale).to(x.dtype) * weight_h
        return y if residual is None else residual + y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        x, weight_h, scale = ctx.saved_tensors
        d_residual = d_y if ctx.needs_input_grad[3] else None
        if x.is_cuda:
            from ouro_megatron.kernels import rms_norm

            return *rms_norm.backward(d_y, x, weight_h, scale), None, d_residual
        normed = x.to(scale.dtype) * scale
        d_weight_h = None
        if ctx.needs_input_grad[1]:
            d_weight_h = (d_y * normed.to(x.dtype)).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight_h, None, d_residual
        d_normed = (d_y * weight_h).to(scale.dtype)
        d_x = scale * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), d_weight_h, None, d_residual


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or wider whatever the input's dtype.

    The signature is what Megatron-Core's layer specs call. Under sequence parallelism each tensor-parallel rank sees
    other tokens, so the weight is marked for Megatron's gradient all-reduce over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_sbh: Tensor, residual_sbh: Tensor | None = None) -> Tensor:
        """The normed `x_sbh`, added to `residual_sbh` when there is one: on CUDA in one pass over memory."""
        return _RMSNorm.apply(x_sbh, self.weight, self.eps, residual_sbh)
