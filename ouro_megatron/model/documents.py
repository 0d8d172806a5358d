"""Documents that lie in one sequence and must not see each other: block-diagonal causal attention without a mask."""

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DocumentBounds:
    """Where the documents of one microbatch lie. Nothing here is larger than the batch's tokens.

    Travels through Megatron's layers in the place of its PackedSeqParams, down to the attention core. There is one for
    a microbatch, the same in every loop.
    """

    positions_sb: Tensor
    """int64 [s, b]: each token's place in its document, for RoPE."""
    lengths: tuple[int, ...]
    """Of all documents, row after row; they add up to b * s."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: their bounds in the rows laid end to end."""
    longest: int
    qkv_format = "sbhd"
    """Tells Megatron's attention to leave shapes and angles alone: the core cuts the documents."""

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(length, documents of it), the shortest first; each document by itself, in order, where few share a length:
        sorting them would cost more than it saves."""
        counts = Counter(self.lengths)
        if 2 * len(counts) > len(self.lengths):
            return [(length, 1) for length in self.lengths]
        return sorted(counts.items())

    @cached_property
    def order(self) -> Tensor | None:
        """int64 [b * s]: tokens of the rows laid end to end, in the order of `groups`; None when it is theirs."""
        if [length for length, count in self.groups for _ in range(count)] == list(self.lengths):
            return None
        lengths, starts = self.cu_seqlens.diff().long(), self.cu_seqlens[:-1].long()
        by_length = lengths.argsort(stable=True)
        lengths, starts = lengths[by_length], starts[by_length]
        ends = lengths.cumsum(0)
        shift = (starts - ends + lengths).repeat_interleave(lengths)
        return torch.arange(sum(self.lengths), device=shift.device) + shift

    @cached_property
    def back(self) -> Tensor:
        """The inverse of `order`."""
        assert self.order is not None
        return self.order.argsort()

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor], device: torch.device) -> "DocumentBounds | None":
        """From `positions_bs` of what a MicrobatchReader yields; None where data has no document mask."""
        return cls.of(batch["positions_bs"], device) if "positions_bs" in batch else None

    @classmethod
    def of(cls, positions_bs: Tensor, device: torch.device) -> "DocumentBounds":
        """From int64 [b, s] positions on the CPU: a document begins where they are 0, and they rise by 1 inside it.

        Raises ValueError for positions that do not begin with 0 in every row.
        """
        if bool((positions_bs[:, 0] != 0).any()):
            raise ValueError("every row of positions begins with a document, at position 0")
        starts = (positions_bs.reshape(-1) == 0).nonzero().reshape(-1)
        bounds = torch.cat((starts, starts.new_tensor([positions_bs.numel()])))
        lengths = tuple(bounds.diff().tolist())
        return cls(
            positions_sb=positions_bs.t().contiguous().to(device, non_blocking=True),
            lengths=lengths,
            cu_seqlens=bounds.to(torch.int32).to(device, non_blocking=True),
            longest=max(lengths),
        )


def document_attention(query: Tensor, key: Tensor, value: Tensor, documents: DocumentBounds) -> Tensor:
    """Causal attention inside each document: query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d].

    Memory grows with s, work with the sum of squared document lengths. One flash-attention call on CUDA in half
    precision, else a call for each length that documents have.
    """
    s, b, n, d = query.shape
    q, k, v = (x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value))
    grouped = n != key.shape[2]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        context = _flash(q, k, v, documents, grouped)
    else:
        context = _by_length(q, k, v, documents, grouped)
    return context.view(b, s, n, d).transpose(0, 1)


def _flash(q_tnd: Tensor, k_tgd: Tensor, v_tgd: Tensor, documents: DocumentBounds, grouped: bool) -> Tensor:
    bounds, longest = documents.cu_seqlens, documents.longest
    return causal_runs(q_tnd, k_tgd, v_tgd, (bounds, bounds), (longest, longest), grouped)


def causal_runs(
    q_tnd: Tensor,
    k_tgd: Tensor,
    v_tgd: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    grouped: bool,
) -> Tensor:
    """Flash attention of runs of queries, each over its run of keys, causal and aligned at both ends: -> [t, n, d].

    CUDA and half precision only. `bounds`: where runs of queries and of keys begin, int32, with their total last.
    """
    from torch.nn.attention.varlen import varlen_attn

    # A window that reaches back to the start and not ahead is causal.
    arguments: dict[str, Any] = {"window_size": (-1, 0)}
    if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        arguments["enable_gqa"] = True
    elif grouped:  # torch 2.11
        shared = q_tnd.shape[1] // k_tgd.shape[1]
        k_tgd, v_tgd = (x.repeat_interleave(shared, dim=1) for x in (k_tgd, v_tgd))
    context = varlen_attn(q_tnd, k_tgd, v_tgd, *bounds, *longest, **arguments)
    assert isinstance(context, Tensor)
    return context


def _by_length(q_tnd: Tensor, k_tgd: Tensor, v_tgd: Tensor, documents: DocumentBounds, grouped: bool) -> Tensor:
    groups = documents.groups
    order = documents.order
    if order is not None:
        q_tnd, k_tgd, v_tgd = (x.index_select(0, order) for x in (q_tnd, k_tgd, v_tgd))
    parts = []
    sizes = [length * count for length, count in groups]
    # `split` has one backward for all parts; slicing would add up a whole tensor of zeros for each.
    for (length, count), *qkv in zip(groups, *(x.split(sizes) for x in (q_tnd, k_tgd, v_tgd)), strict=True):
        q_bnsd, k_bgsd, v_bgsd = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        part = F.scaled_dot_product_attention(q_bnsd, k_bgsd, v_bgsd, is_causal=length > 1, enable_gqa=grouped)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    together = torch.cat(parts) if len(parts) > 1 else parts[0]
    return together if order is None else together.index_select(0, documents.back)
