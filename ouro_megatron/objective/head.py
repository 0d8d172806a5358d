"""The loss head: cross-entropy of one loop over a vocabulary cut across ranks, with its gradients, in one pass.

At loop t the exit probability p_t is already known (it depends on gates 1..t only), so the coefficient of every
token's cross-entropy is too. Logits are formed for a chunk of tokens, turned into loss and gradients, and dropped:
nothing of size tokens x vocabulary outlives its chunk.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
        logits = (hidden[part] @ weight.t()).to(wide)
        chunk = _chunk_cross_entropy(logits, labels_n[part], first_id, head)
        ce_n[part] = chunk.ce_n
        if coefficient_n is None or d_hidden is None or d_weight is None:
            continue
        # From exponentials to gradients in one pass over the logits' own memory.
        coefficient = coefficient_n[part].to(wide)
        logits.mul_((coefficient / chunk.denominator_n)[:, None])
        logits.scatter_add_(1, chunk.local_label_n[:, None], -(chunk.is_local_n * coefficient)[:, None])
        d_logits = logits.to(weight.dtype)
        del logits
        d_hidden[part] = d_logits @ weight
        if d_weight.dtype == d_logits.dtype:
            d_weight.addmm_(d_logits.t(), hidden[part])
        else:
            d_weight.add_(d_logits.t() @ hidden[part])
    if d_hidden is None:
        return ce_n, None
    shape = (-1, *h_sbh.shape[1:])
    return ce_n, HeadGradients(_reduce_hidden(d_hidden.view(shape), head), None if main_grad is not None else d_weight)


class _Chunk(NamedTuple):
    """What is known of a chunk once its logits became exponentials."""

    ce_n: Tensor
    denominator_n: Tensor
    """Of the softmax, over the whole vocabulary."""
    local_label_n: Tensor
    """Index among this rank's rows."""
    is_local_n: Tensor
    """Whether the label is one of them."""


def _chunk_cross_entropy(logits_nv: Tensor, labels_n: Tensor, first_id: int, head: HeadGroup) -> _Chunk:
    """Turns logits [n, v/tp] into their exponentials, less each row's largest logit, in place."""
    maximum = logits_nv.amax(dim=-1)
    if head.size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=head.group)
    logits_nv.sub_(maximum[:, None])
    local_label = labels_n - first_id
    is_local = (local_label >= 0) & (local_label < logits_nv.shape[1])
    local_label = local_label.clamp(0, logits_nv.shape[1] - 1)
    target = logits_nv.gather(1, local_label[:, None]).squeeze(1).masked_fill(~is_local, 0.0)
    sums = torch.stack((logits_nv.exp_().sum(dim=-1), target))
    if head.size > 1:
        dist.all_reduce(sums, group=head.group)
    denominator, target = sums
    return _Chunk(denominator.log() - target, denominator, local_label, is_local)


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
