"""The loss head: cross-entropy of one loop over a vocabulary cut across ranks, with its gradients, in one pass.

At loop t the exit probability p_t is already known (it depends on gates 1..t only), so the coefficient of every
token's cross-entropy is too. Logits are formed for a chunk of tokens, turned into loss and gradients, and dropped:
nothing of size tokens x vocabulary outlives its chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HeadGroup:
    """The tensor-parallel group the vocabulary is cut over."""

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence_parallel: bool


@dataclass(frozen=True)
class HeadGradients:
    """What one pass leaves behind when gradients are wanted."""

    hidden_sbh: Tensor
    weight_vh: Tensor | None
    """None when it was added to the weight's `main_grad` directly."""


def token_cross_entropy(
    h_sbh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    coefficient_n: Tensor | None,
    head: HeadGroup,
    chunk_tokens: int,
) -> tuple[Tensor, HeadGradients | None]:
    """Cross-entropy of every token and, with `coefficient_n`, the gradients of sum_n coefficient_n * CE_n.

    h_sbh: [s, b, h], or [s / tensor_parallel, b, h] under sequence parallelism. weight_vh: this rank's rows of the
    head, [v / tensor_parallel, h]. labels_n: int64 [s * b], sequence-major. coefficient_n: fp32 [s * b].
    Returns CE [s * b] in fp32 (fp64 for fp64 input). Collectives: two a chunk, one more for the hidden gradient.
    """
    hidden = _gather_sequence(h_sbh.detach(), head).flatten(0, 1)
    weight = weight_vh.detach()
    first_id = head.rank * weight.shape[0]
    wants_grad = coefficient_n is not None
    wide = torch.promote_types(hidden.dtype, torch.float32)
    ce_n = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    main_grad = getattr(weight_vh, "main_grad", None)
    d_hidden = torch.empty_like(hidden) if wants_grad else None
    d_weight = main_grad
    if wants_grad and d_weight is None:
        d_weight = torch.zeros_like(weight, dtype=wide)
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        coefficient = None if coefficient_n is None else coefficient_n[part]
        chunk = _chunk_on_cuda if hidden.is_cuda else _chunk
        # The logits are handed on without a name here, so that they are gone once they have become something else.
        ce_n[part], d_logits = chunk(hidden[part] @ weight.t(), labels_n[part], coefficient, first_id, head)
        if d_logits is None or d_hidden is None or d_weight is None:
            continue
        torch.mm(d_logits, weight, out=d_hidden[part])
        _add_product(d_weight, d_logits, hidden[part])
        del d_logits  # not there any more when the next chunk's logits are formed
    if d_hidden is None:
        return ce_n, None
    shape = (-1, *h_sbh.shape[1:])
    return ce_n, HeadGradients(_reduce_hidden(d_hidden.view(shape), head), None if main_grad is not None else d_weight)


def _chunk(
    logits_nv: Tensor, labels_n: Tensor, coefficient_n: Tensor | None, first_id: int, head: HeadGroup
) -> tuple[Tensor, Tensor | None]:
    """CE [n] in fp32 or wider and, with `coefficient_n`, its weighted gradient by the logits in their dtype."""
    dtype = logits_nv.dtype
    logits_nv = logits_nv.to(torch.promote_types(dtype, torch.float32))
    maximum = logits_nv.amax(dim=-1)
    if head.size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=head.group)
    logits_nv = logits_nv.sub_(maximum[:, None])
    local_label = labels_n - first_id
    is_local = (local_label >= 0) & (local_label < logits_nv.shape[1])
    local_label = local_label.clamp(0, logits_nv.shape[1] - 1)
    target = logits_nv.gather(1, local_label[:, None]).squeeze(1).masked_fill(~is_local, 0.0)
    exponent = logits_nv.exp_()
    sums = torch.stack((exponent.sum(dim=-1), target))
    if head.size > 1:
        dist.all_reduce(sums, group=head.group)
    denominator, target = sums
    ce_n = denominator.log() - target
    if coefficient_n is None:
        return ce_n, None
    coefficient_n = coefficient_n.to(exponent.dtype)
    d_logits = exponent.mul_((coefficient_n / denominator)[:, None])
    d_logits.scatter_add_(1, local_label[:, None], -(is_local * coefficient_n)[:, None])
    return ce_n, d_logits.to(dtype)


def _chunk_on_cuda(
    logits_nv: Tensor, labels_n: Tensor, coefficient_n: Tensor | None, first_id: int, head: HeadGroup
) -> tuple[Tensor, Tensor | None]:
    """The same in two passes over the logits, whose memory the gradient takes."""
    from ouro_megatron.kernels import cross_entropy

    maximum, total, target = cross_entropy.statistics(logits_nv, labels_n, first_id)
    if head.size > 1:
        own_maximum = maximum.clone()
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=head.group)
        sums = torch.stack((total * torch.exp(own_maximum - maximum), target))
        dist.all_reduce(sums, group=head.group)
        total, target = sums
    log_total = total.log() + maximum
    ce_n = log_total - target
    if coefficient_n is None:
        return ce_n, None
    return ce_n, cross_entropy.gradient_in_place(logits_nv, labels_n, coefficient_n, log_total, first_id)


def _add_product(total_vh: Tensor, d_logits_nv: Tensor, hidden_nh: Tensor) -> None:
    """total += d_logits^T hidden, summed in total's precision where the device can."""
    if total_vh.dtype == d_logits_nv.dtype:
        total_vh.addmm_(d_logits_nv.t(), hidden_nh)
    elif total_vh.is_cuda:
        torch.addmm(total_vh, d_logits_nv.t(), hidden_nh, out_dtype=total_vh.dtype, out=total_vh)
    else:
        total_vh.add_(d_logits_nv.t() @ hidden_nh)


def _gather_sequence(h_sbh: Tensor, head: HeadGroup) -> Tensor:
    if not head.sequence_parallel or head.size == 1:
        return h_sbh
    whole = h_sbh.new_empty((h_sbh.shape[0] * head.size, *h_sbh.shape[1:]))
    dist.all_gather_into_tensor(whole, h_sbh.contiguous(), group=head.group)
    return whole


def _reduce_hidden(partial_sbh: Tensor, head: HeadGroup) -> Tensor:
    """Adds up the vocabulary shards' parts; under sequence parallelism each rank keeps its own tokens."""
    if head.size == 1:
        return partial_sbh
    if not head.sequence_parallel:
        dist.all_reduce(partial_sbh, group=head.group)
        return partial_sbh
    own = partial_sbh.new_empty((partial_sbh.shape[0] // head.size, *partial_sbh.shape[1:]))
    dist.reduce_scatter_tensor(own, partial_sbh, group=head.group)
    return own


class WeightedCrossEntropy(torch.autograd.Function):
    """sum_n coefficient_n * CE_n as a scalar whose backward hands out gradients made in forward.

    When the weight has a `main_grad` buffer (Megatron's DDP), its gradient is added there in forward; that is right
    only for an incoming gradient of one, which is what Megatron's schedules give a loss summed over tokens. Where
    gradients are reduced while backward runs, the weight's `gradient_is_in` is called in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_sbh: Tensor,
        weight_vh: Tensor,
        labels_n: Tensor,
        coefficient_n: Tensor,
        head: HeadGroup,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        ce_n, gradients = token_cross_entropy(h_sbh, weight_vh, labels_n, coefficient_n, head, chunk_tokens)
        assert gradients is not None
        ctx.save_for_backward(gradients.hidden_sbh, gradients.weight_vh)
        ctx.weight_dtype = weight_vh.dtype
        ctx.announce = getattr(weight_vh, "gradient_is_in", None)
        ctx.mark_non_differentiable(ce_n)
        return (coefficient_n.to(ce_n.dtype) * ce_n).sum(), ce_n

    @staticmethod
    def backward(ctx: Any, d_term: Tensor, d_ce: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if ctx.announce is not None:
            ctx.announce()
        weight_gradient = None if d_weight is None else (d_weight * d_term).to(ctx.weight_dtype)
        return d_hidden * d_term.to(d_hidden.dtype), weight_gradient, None, None, None, None
