"""silu(gate) * up and its gradient, each in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(d_out, gate_up, d_gate_up, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * 2 * width + columns
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(d_out + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # d silu(g) / d g = sigmoid(g) + silu(g) (1 - sigmoid(g))
    d_gate = incoming * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(d_gate_up + at, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + at + width, (incoming * silu).to(d_gate_up.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor) -> Tensor:
    """[.., 2f], the halves gate and up -> [.., f]."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _forward[(out.numel() // width, triton.cdiv(width, _BLOCK))](gate_up, out, width, BLOCK=_BLOCK)
    return out


def backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `forward`'s input, [.., 2f]."""
    d_out, gate_up = d_out.contiguous(), gate_up.contiguous()
    width = d_out.shape[-1]
    d_gate_up = torch.empty_like(gate_up)
    grid = (d_out.numel() // width, triton.cdiv(width, _BLOCK))
    _backward[grid](d_out, gate_up, d_gate_up, width, BLOCK=_BLOCK)
    return d_gate_up
