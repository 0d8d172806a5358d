"""Which fused GPU pieces serve a run, and what stands in for the others. Decided once, said once at start."""

import importlib
from dataclasses import dataclass
from typing import Literal

import torch

Implementation = Literal["local", "transformer_engine"]


def fuses_weight_gradients(implementation: Implementation, device: torch.device) -> str | None:
    """Who adds weight gradients to their buffer inside the matrix product; None: autograd makes them, a hook adds them.

    Transformer Engine's linears do it themselves, the local ones with apex's `fused_weight_gradient_mlp_cuda`.
    """
    if device.type != "cuda":
        return None
    if implementation == "transformer_engine":
        return "Transformer Engine"
    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except ImportError:  # absent, or built for another torch
        return None
    return "apex"


@dataclass(frozen=True)
class FusedPieces:
    """Who does what in a run; None where plain torch does."""

    weight_gradients: str | None
    adam: str | None
    gradient_norm: str | None

    def describe(self) -> str:
        """One line: "weight gradients added by apex; Adam: Transformer Engine; gradient norm: torch"."""
        gradients = f"inside the product by {self.weight_gradients}" if self.weight_gradients else "by a hook (torch)"
        return (
            f"weight gradients are added {gradients}; Adam: {self.adam or 'torch'}; "
            f"gradient norm: {self.gradient_norm or 'torch'}"
        )


def fused_pieces(implementation: Implementation, device: torch.device) -> FusedPieces:
    """What Megatron-Core found when it was imported. On a CPU all is torch's (parallel/platform.py)."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads

    return FusedPieces(
        weight_gradients=fuses_weight_gradients(implementation, device),
        adam=_library_of(optimizer.Adam.__module__),
        gradient_norm=_library_of(clip_grads.l2_norm_impl.__module__),
    )


def _library_of(module: str) -> str | None:
    root = module.split(".")[0]
    return {"transformer_engine": "Transformer Engine", "transformer_engine_torch": "Transformer Engine"}.get(
        root, "apex" if root in ("apex", "amp_C") else None
    )
