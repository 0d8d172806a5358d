"""Softmax statistics of logits and their gradient in place: two passes over a chunk of logits, nothing in fp32 kept."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _statistics(logits, labels, maximum, total, target, first_id, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane_maximum = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    lane_total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * WIDTH + columns, mask=columns < WIDTH, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(lane_maximum, value)
        # Lanes that saw nothing yet hold -inf; their difference would not be a number.
        kept = tl.where(larger == float("-inf"), 0.0, larger)
        lane_total = lane_total * tl.exp(lane_maximum - kept) + tl.exp(value - kept)
        lane_maximum = larger
    row_maximum = tl.max(lane_maximum, axis=0)
    row_total = tl.sum(lane_total * tl.exp(lane_maximum - row_maximum), axis=0)
    label = tl.load(labels + row) - first_id
    is_local = (label >= 0) & (label < WIDTH)
    at_label = tl.load(logits + row * WIDTH + tl.where(is_local, label, 0), mask=is_local, other=0.0).to(tl.float32)
    tl.store(maximum + row, row_maximum)
    tl.store(total + row, row_total)
    tl.store(target + row, at_label)


@triton.jit
def _gradient(logits, labels, coefficient, log_total, first_id, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = logits + row * width + columns
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    probability = tl.exp(value - tl.load(log_total + row))
    label = tl.load(labels + row) - first_id
    gradient = (probability - tl.where(columns == label, 1.0, 0.0)) * tl.load(coefficient + row)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=inside)


def statistics(logits_nv: Tensor, labels_n: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row in fp32: the maximum, the sum of exp(logit - maximum), and the label's logit (0 when it is elsewhere).

    labels_n: int64, global ids; this rank's columns are [first_id, first_id + v).
    """
    rows, width = logits_nv.shape
    maximum, total, target = torch.empty(3, rows, dtype=torch.float32, device=logits_nv.device)
    _statistics[(rows,)](
        logits_nv,
        labels_n,
        maximum,
        total,
        target,
        first_id,
        WIDTH=width,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        num_warps=8,
    )
    return maximum, total, target


def gradient_in_place(
    logits_nv: Tensor, labels_n: Tensor, coefficient_n: Tensor, log_total_n: Tensor, first_id: int
) -> Tensor:
    """Turns logits into coefficient * (softmax - one-hot of the label). log_total_n: log-sum-exp over all ranks."""
    rows, width = logits_nv.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gradient[(rows, triton.cdiv(width, block))](
        logits_nv, labels_n, coefficient_n, log_total_n, first_id, width, BLOCK=block, num_warps=8
    )
    return logits_nv
