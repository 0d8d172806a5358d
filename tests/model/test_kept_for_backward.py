"""The norm and the activation: right gradients, and little kept between forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.model.norm import _RMSNorm
from ouro_megatron.model.swiglu import _SwiGLU


def kept_bytes(*inputs: Tensor, of: type[torch.autograd.Function], extra: tuple[object, ...] = ()) -> int:
    """Bytes of the distinct storages that a forward pass keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        of.apply(*inputs, *extra)
    return sum(storages.values())


def test_rms_norm_gradients_and_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-6, None), (x, weight))
    assert torch.autograd.gradcheck(
        lambda x, w, r: _RMSNorm.apply(x, w, 1e-6, r), (x, weight, torch.rand_like(x, requires_grad=True))
    )
    assert torch.allclose(_RMSNorm.apply(x, weight, 1e-6, None), F.rms_norm(x, (8,), weight, 1e-6), atol=1e-12)


def test_swiglu_gradients_and_values() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (x,))
    assert torch.allclose(_SwiGLU.apply(x), F.silu(x[..., :4]) * x[..., 4:])


def test_bf16_keeps_the_input_and_one_number_a_token() -> None:
    x = torch.randn(16, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    tokens = 16 * 4
    assert kept_bytes(x, weight, of=_RMSNorm, extra=(1e-6, None)) == tokens * (32 * 2 + 4) + 32 * 2
    assert kept_bytes(x, of=_SwiGLU) == tokens * 32 * 2


def test_a_frozen_weight_costs_no_gradient() -> None:
    x = torch.randn(4, 2, 8, requires_grad=True)
    weight = torch.ones(8)
    _RMSNorm.apply(x, weight, 1e-6, None).sum().backward()
    assert x.grad is not None and weight.grad is None
