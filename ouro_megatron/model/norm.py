"""RMSNorm that works under sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


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

    def forward(self, x_sbh: Tensor) -> Tensor:
        wide = x_sbh if x_sbh.dtype == torch.float64 else x_sbh.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x_sbh.dtype) * self.weight
