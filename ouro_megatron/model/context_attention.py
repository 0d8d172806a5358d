"""Causal attention of a sequence that is cut over context-parallel ranks, on torch's own kernels.

Each rank gathers all keys and values, lets its two slices of queries look at what lies before them, and sends the
gradients of keys and values back where they belong. What was gathered is dropped after forward and gathered again in
backward: a rank keeps its own tokens' activations only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.model.documents import causal_runs
from ouro_megatron.parallel.sequence_slices import own_positions, places_in_gathered, slice_numbers

BLOCK = 256
"""Queries whose mask is in memory at one time, where kernels need one."""


@dataclass(frozen=True)
class Sight:
    """What the queries of one slice, all rows of a microbatch laid end to end, look at.

    They come in runs: queries that follow each other in one document, with the document's keys up to the last of them.
    """

    queries: tuple[int, ...]
    """Length of each run; they add up to the slice's tokens."""
    keys: tuple[int, ...]
    """Keys of each run, as many as its queries or more."""
    where: Tensor
    """int64 [sum of keys]: the runs' keys among the gathered tokens, which are laid out as [rank, s / size, b]."""
    query_bounds: Tensor
    """int32 [runs + 1]"""
    key_bounds: Tensor
    """int32 [runs + 1]"""
    masks: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    """At most one: what all runs, layers and loops take their masks from, where kernels need one in memory."""

    def mask(self, queries: int, keys: int, like: Tensor) -> Tensor | None:
        """Under which the last of `queries` sees the last of `keys`; None where plain causality says the same."""
        if queries in (1, keys):
            return None
        if like.is_cuda:  # the shape is all that its kernels need
            # Its module imports torch's compiler, which takes a second or two.
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(queries, keys)
        if not self.masks:
            rows, columns = min(BLOCK, max(self.queries)), max(self.keys)
            hidden = torch.ones(rows, columns + rows, dtype=torch.bool, device=like.device).triu(columns + 1)
            self.masks.append(torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, -torch.inf))
        whole = self.masks[0]
        before = whole.shape[1] - whole.shape[0]
        return whole[:queries, before + queries - keys : before + queries]


@dataclass(frozen=True)
class ContextPart:
    """A context-parallel rank's part of one microbatch. Nothing here is larger than the microbatch's tokens.

    Like DocumentBounds it travels in the place of Megatron's PackedSeqParams, down to the attention core.
    """

    positions_sb: Tensor
    """int64 [s / size, b]: each own token's place in its document, for RoPE."""
    sights: tuple[Sight, Sight]
    """Of the rank's two slices, in order."""
    qkv_format = "sbhd"

    @classmethod
    def of(
        cls, documents: Sequence[int], rows: int, length: int, rank: int, size: int, device: torch.device
    ) -> "ContextPart":
        """`documents`: lengths of all documents of `rows` rows of `length` tokens, row after row."""
        begins = _document_begins(documents, rows, length)
        places = places_in_gathered(length, size)
        each = length // (2 * size)
        sights = [_sight(begins, places, number * each, each, device) for number in slice_numbers(rank, size)]
        own = own_positions(length, rank, size)
        positions_sb = torch.stack([own - _begin_of_each(row, length)[own] for row in begins], dim=1)
        return cls(positions_sb.to(device), (sights[0], sights[1]))


def _document_begins(documents: Sequence[int], rows: int, length: int) -> list[list[int]]:
    """By row: where its documents begin."""
    begins: list[list[int]] = []
    left = 0
    for size in documents:
        if left == 0:
            begins.append([])
            left = length
        begins[-1].append(length - left)
        left -= size
    if left != 0 or len(begins) != rows:
        raise ValueError(f"documents of {sum(documents)} tokens do not fill {rows} rows of {length}")
    return begins


def _begin_of_each(begins: list[int], length: int) -> Tensor:
    """int64 [length]: where each token's document begins."""
    bounds = torch.tensor([*begins, length], device="cpu")
    return bounds[:-1].repeat_interleave(bounds.diff())


def _sight(begins: list[list[int]], places: Tensor, first: int, count: int, device: torch.device) -> Sight:
    """What the queries [first, first + count) of each row look at."""
    queries, keys, where = [], [], []
    for row, starts in enumerate(begins):
        for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
            until = min(end, first + count)
            seen = until - max(begin, first)
            if seen > 0:
                queries.append(seen)
                keys.append(until - begin)
                where.append(places[begin:until] * len(begins) + row)
    return Sight(
        tuple(queries),
        tuple(keys),
        torch.cat(where).to(device),
        _bounds(queries).to(device),
        _bounds(keys).to(device),
    )


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)


def context_attention(query: Tensor, key: Tensor, value: Tensor, part: ContextPart, group: dist.ProcessGroup) -> Tensor:
    """query [s / size, b, n, d], key and value [s / size, b, g, d] -> [s / size, b, n, d].

    All ranks of `group` call it together. Communication: one all-gather of keys and values; in backward the same again
    and one reduce-scatter of their gradients.
    """
    seen = _GatherSeen.apply(key, value, part, group)
    # Inside a backward pass this is a recomputed forward, whose own backward follows at once: nothing to drop.
    in_backward = torch._C._current_graph_task_id() != -1
    drop = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)) and not in_backward
    kept = (key.detach(), value.detach())
    with _gathered_again(seen, lambda: _seen(*kept, part, group)) if drop else nullcontext():
        return attend_slices(query, seen, part)


def attend_slices(query: Tensor, seen: tuple[Tensor, ...], part: ContextPart) -> Tensor:
    """query [s / size, b, n, d], of each slice [keys, 2, g, d] in the order of its runs -> [s / size, b, n, d]."""
    s, b, n, d = query.shape
    slices = query.unflatten(0, (2, s // 2)).transpose(1, 2).flatten(1, 2).unbind()
    contexts = []
    for q_tnd, keys_values, sight in zip(slices, seen, part.sights, strict=True):
        k_tgd, v_tgd = keys_values.unbind(1)
        contexts.append(_attend(q_tnd, k_tgd, v_tgd, sight))
    return torch.cat([context.view(b, s // 2, n, d).transpose(0, 1) for context in contexts])


def _attend(q_tnd: Tensor, k_tgd: Tensor, v_tgd: Tensor, sight: Sight) -> Tensor:
    """Causal attention of each run, whose last query looks at its last key. One flash-attention call on CUDA in half
    precision, else a call for each run."""
    grouped = q_tnd.shape[1] != k_tgd.shape[1]
    if q_tnd.is_cuda and q_tnd.dtype in (torch.bfloat16, torch.float16):
        bounds, longest = (sight.query_bounds, sight.key_bounds), (max(sight.queries), max(sight.keys))
        return causal_runs(q_tnd, k_tgd, v_tgd, bounds, longest, grouped)
    runs = zip(q_tnd.split(sight.queries), k_tgd.split(sight.keys), v_tgd.split(sight.keys), strict=True)
    return torch.cat([part for run in runs for part in _blocks(*run, sight)])


def _blocks(q_tnd: Tensor, k_tgd: Tensor, v_tgd: Tensor, sight: Sight) -> Iterator[Tensor]:
    """One run, so many queries at a time that a mask stays small."""
    queries, keys = len(q_tnd), len(k_tgd)
    step = queries if q_tnd.is_cuda or queries == keys else BLOCK
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        seen = keys - queries + end
        q_bnsd, k_bgsd, v_bgsd = (x.transpose(0, 1)[None] for x in (q_tnd[begin:end], k_tgd[:seen], v_tgd[:seen]))
        mask = sight.mask(end - begin, seen, q_tnd)
        part = F.scaled_dot_product_attention(
            q_bnsd,
            k_bgsd,
            v_bgsd,
            attn_mask=mask,
            is_causal=mask is None and end - begin > 1,
            enable_gqa=q_tnd.shape[1] != k_tgd.shape[1],
        )
        yield part[0].transpose(0, 1)


def _seen(key: Tensor, value: Tensor, part: ContextPart, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gathers keys and values; of each slice [keys, 2, g, d] in the order of its runs."""
    own = torch.stack((key, value), dim=2)
    gathered = own.new_empty((group.size() * own.shape[0], *own.shape[1:]))
    dist.all_gather_into_tensor(gathered, own, group=group)
    tokens = gathered.flatten(0, 1)
    first, second = (tokens.index_select(0, sight.where) for sight in part.sights)
    return first, second


class _GatherSeen(torch.autograd.Function):
    """`_seen`; backward adds up each key's gradients of both slices and of all ranks, on the rank that owns it."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, part: ContextPart, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.part, ctx.group, ctx.shape = part, group, key.shape
        return _seen(key, value, part, group)

    @staticmethod
    def backward(ctx: Any, *d_seen: Tensor) -> tuple[Tensor | None, ...]:
        s, b, g, d = ctx.shape
        d_all = d_seen[0].new_zeros((ctx.group.size() * s * b, 2, g, d))
        for sight, d_slice in zip(ctx.part.sights, d_seen, strict=True):
            d_all.index_add_(0, sight.where, d_slice)
        d_own = d_all.new_empty((s, b, 2, g, d))
        dist.reduce_scatter_tensor(d_own, d_all.view(-1, b, 2, g, d), group=ctx.group)
        d_key, d_value = d_own.unbind(2)
        return d_key, d_value, None, None


class _Remade:
    """Tensors made again for one backward pass: by whoever asks first, let go of after the last who will ask."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self._make = make
        self._made: tuple[Tensor, ...] | None = None
        self.uses = 0

    def take(self, index: int) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        taken = self._made[index]
        self.uses -= 1
        if self.uses == 0:
            self._made = None
        return taken


@dataclass(frozen=True)
class _Dropped:
    """Stands in a graph for a view of a tensor that is made again."""

    remade: _Remade
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def _gathered_again(tensors: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]) -> Iterator[None]:
    """What operations inside the block save of `tensors`, any view of them, is dropped and made again in backward.

    `make` gives all of them at once and is called once a backward pass, whoever asks first.
    """
    # The hooks live as long as the graph: they must not hold the tensors themselves.
    storages = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}
    remade = _Remade(make)

    def pack(saved: Tensor) -> Tensor | _Dropped:
        index = storages.get(saved.untyped_storage()._cdata)
        if index is None:
            return saved
        remade.uses += 1
        return _Dropped(remade, index, saved.size(), saved.stride(), int(saved.storage_offset()))

    def unpack(kept: Tensor | _Dropped) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return kept.remade.take(kept.index).as_strided(kept.size, kept.stride, kept.offset)

    hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    with hooks:
        yield
