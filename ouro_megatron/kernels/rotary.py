"""Cuts Megatron's mixed query/key/value product apart and turns queries and keys (RoPE), in one pass over memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    mixed,
    angles,
    query,
    key,
    value,
    batch,
    angle_batch,
    groups,
    PER_GROUP: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One token: `mixed` [groups, (PER_GROUP + 2) * 2 * HALF] to query, key and value, or back."""
    token = tl.program_id(0).to(tl.int64)
    angle_row = token if angle_batch > 1 else token // batch
    lane = tl.arange(0, HALF)
    group = tl.arange(0, GROUPS)
    inside = (group < groups)[:, None] & (lane < HALF)[None, :]
    angle = tl.load(angles + angle_row * 2 * HALF + lane)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    if BACKWARD:
        sine = -sine
    for slot in tl.static_range(PER_GROUP + 2):
        source = (token * groups + group[:, None]) * (PER_GROUP + 2) * 2 * HALF + slot * 2 * HALF + lane[None, :]
        if slot < PER_GROUP:
            part = query
            target = ((token * groups + group[:, None]) * PER_GROUP + slot) * 2 * HALF + lane[None, :]
        else:
            part = key if slot == PER_GROUP else value
            target = (token * groups + group[:, None]) * 2 * HALF + lane[None, :]
        if BACKWARD:
            low = tl.load(part + target, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(part + target + HALF, mask=inside, other=0.0).to(tl.float32)
        else:
            low = tl.load(mixed + source, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(mixed + source + HALF, mask=inside, other=0.0).to(tl.float32)
        if slot <= PER_GROUP:
            turned_low = low * cosine - high * sine
            high = high * cosine + low * sine
            low = turned_low
        if BACKWARD:
            tl.store(mixed + source, low.to(mixed.dtype.element_ty), mask=inside)
            tl.store(mixed + source + HALF, high.to(mixed.dtype.element_ty), mask=inside)
        else:
            tl.store(part + target, low.to(part.dtype.element_ty), mask=inside)
            tl.store(part + target + HALF, high.to(part.dtype.element_ty), mask=inside)


def _launch(mixed: Tensor, angles: Tensor, parts: tuple[Tensor, Tensor, Tensor], *, backward: bool) -> None:
    query, key, value = parts
    s, b, groups, dim = key.shape
    half = dim // 2
    _turn[(s * b,)](
        mixed,
        angles,
        query,
        key,
        value,
        b,
        angles.shape[1],
        groups,
        PER_GROUP=query.shape[2] // groups,
        HALF=half,
        GROUPS=triton.next_power_of_2(groups),
        BACKWARD=backward,
    )


class SplitRotary(torch.autograd.Function):
    """mixed [s, b, g, (n/g + 2) * d], angles [s, 1 or b, 1, d] fp32 -> query [s, b, n, d], key and value [s, b, g, d].

    Each group of `mixed` holds its n/g queries, its key and its value (Megatron-Core's order). Rotate-half RoPE; the
    head dimension d must be twice a power of two.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, angles: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        mixed, angles = mixed.contiguous(), angles.contiguous()
        s, b, groups, width = mixed.shape
        parts = (
            mixed.new_empty(s, b, groups * (width // dim - 2), dim),
            mixed.new_empty(s, b, groups, dim),
            mixed.new_empty(s, b, groups, dim),
        )
        _launch(mixed, angles, parts, backward=False)
        ctx.save_for_backward(angles)
        ctx.shape = mixed.shape
        return parts

    @staticmethod
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        d_query, d_key, d_value = (part.contiguous() for part in d_parts)
        d_mixed = d_query.new_empty(ctx.shape)
        _launch(d_mixed, angles, (d_query, d_key, d_value), backward=True)
        return d_mixed, None, None
