"""Every layout of a weight gives the same product."""

import pytest
import torch
import torch.nn.functional as F

from ouro_megatron.inference.linear import FEW_ROWS, Linear, can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expected", [1, FEW_ROWS, FEW_ROWS + 1, 64])
def test_layouts_agree(dtype: torch.dtype, expected: int) -> None:
    """Whatever number of rows a weight was laid out for, any number can be asked of it."""
    torch.manual_seed(0)
    weight = torch.randn(96, 40).to(dtype)
    linear = Linear(weight.clone(), expected)
    assert (linear.out_features, linear.in_features) == (96, 40)
    assert linear.packed == (can_pack(weight) and (dtype == torch.bfloat16 or expected > FEW_ROWS))
    for rows in (1, 3, 17):
        x = torch.randn(rows, 40).to(dtype)
        wanted = F.linear(x.double(), weight.double())
        made = linear(x)
        assert made.dtype == dtype and made.shape == (rows, 96)
        # bf16 rounds the result to 8 bits.
        bound = 1e-5 if dtype == torch.float32 else float(wanted.abs().max()) * 2**-8
        assert float((made.double() - wanted).abs().max()) < bound
