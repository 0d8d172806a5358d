"""RMSNorm, with the residual addition that follows it in a sandwich layer, in one pass over memory."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(x, weight, residual, y, scale, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    # The normed value is rounded before the gain, as published checkpoints' code does.
    result = (value * inverse).to(y.dtype.element_ty).to(tl.float32) * gain
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
    tl.store(scale + row, inverse)


@triton.jit
def _backward(d_y, x, weight, scale, d_x, d_weight, rows, width, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(STEPS):
        row = (program + step * tl.num_programs(0)).to(tl.int64)
        at = row * width + columns
        here = inside & (at < tl.cast(rows, tl.int64) * width)
        inverse = tl.load(scale + tl.minimum(row, rows - 1))
        normed = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * inverse
        incoming = tl.load(d_y + at, mask=here, other=0.0).to(tl.float32)
        total += incoming * normed
        d_normed = incoming * gain
        mean = tl.sum(d_normed * normed, axis=0) / width
        tl.store(d_x + at, (inverse * (d_normed - normed * mean)).to(d_x.dtype.element_ty), mask=here)
    tl.store(d_weight + program.to(tl.int64) * width + columns, total, mask=inside)


def forward(x: Tensor, weight_h: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [.., h] -> ([residual +] x / rms(x) * weight, 1 / rms(x) in fp32 [..])."""
    x = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    other = x if residual is None else residual.contiguous()
    _forward[(scale.numel(),)](
        x,
        weight_h,
        other,
        y,
        scale,
        width,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return y, scale


def backward(d_y: Tensor, x: Tensor, weight_h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(d x, d weight) of `forward` from the incoming gradient; the residual's gradient is `d_y` itself."""
    d_y, x = d_y.contiguous(), x.contiguous()
    width, rows = x.shape[-1], scale.numel()
    d_x = torch.empty_like(x)
    programs = min(rows, 4 * _multiprocessors(x.device))
    d_weight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _backward[(programs,)](
        d_y,
        x,
        weight_h,
        scale,
        d_x,
        d_weight,
        rows,
        width,
        STEPS=triton.cdiv(rows, programs),
        BLOCK=block,
        num_warps=_warps(block),
    )
    return d_x, d_weight.sum(0).to(weight_h.dtype)


def _warps(block: int) -> int:
    return max(1, min(16, block // 512))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
