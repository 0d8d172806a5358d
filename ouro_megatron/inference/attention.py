"""Attention of one visit: rows of many sequences, at different positions and loops, against the cache.

Rows are cut into jobs once a visit, each one call a layer: a run of single tokens in neighbouring slots of one cache
entry is a job without copying (their keys are one view), several positions of one sequence are another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.inference.cache import KeyValueCache


@dataclass(frozen=True)
class Segment:
    """`count` neighbouring positions of one sequence that visit the layers together at one loop."""

    slot: int
    loop: int
    """1-based."""
    start: int
    """First position."""
    count: int
    tokens: tuple[int, ...] = ()
    """Their token ids at loop 1; later loops go on from their states."""
    prompt: bool = False
    """Attends to its own rows only (start is 0), so that each loop sees its own entries under every cache policy."""

    @property
    def end(self) -> int:
        return self.start + self.count


class Job(NamedTuple):
    rows: slice
    entry: int
    slot: int
    """The first of as many neighbouring slots as there are rows; of `count` rows of one sequence, its own."""
    slots: int
    length: int
    """Positions of the longest sequence."""
    mask: Tensor | None
    """Added to scores [b, 1, 1, length] or [count, length]; None when everything may be seen or `causal` says so."""
    causal: bool
    prompt: bool
    single: bool
    """One row a sequence."""


def plan_jobs(segments: list[Segment], cache: KeyValueCache, dtype: torch.dtype) -> list[Job]:
    """Jobs for segments whose rows follow each other in the order given."""
    jobs: list[Job] = []
    run: list[Segment] = []
    row = 0
    for segment in segments:
        if segment.count == 1 and not segment.prompt:
            if run and not _joins(run, segment, cache):
                jobs.append(_single(run, row, cache, dtype))
                run = []
            run.append(segment)
        else:
            if run:
                jobs.append(_single(run, row, cache, dtype))
                run = []
            jobs.append(_several(segment, row, cache, dtype))
        row += segment.count
    if run:
        jobs.append(_single(run, row, cache, dtype))
    return jobs


def _joins(run: list[Segment], segment: Segment, cache: KeyValueCache) -> bool:
    """Whether a token's keys lie in one view with the run's and padding does not cost more than a call saves."""
    if segment.slot != run[-1].slot + 1 or cache.entry(segment.loop) != cache.entry(run[-1].loop):
        return False
    lengths = [item.end for item in (*run, segment)]
    return max(lengths) * len(lengths) <= 2 * sum(lengths)


def _single(run: list[Segment], next_row: int, cache: KeyValueCache, dtype: torch.dtype) -> Job:
    lengths = [segment.end for segment in run]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        device = cache.device
        hidden = torch.arange(longest, device=device)[None, :] >= torch.tensor(lengths, device=device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]
    rows = slice(next_row - len(run), next_row)
    return Job(rows, cache.entry(run[0].loop), run[0].slot, len(run), longest, mask, False, False, True)


def _several(segment: Segment, row: int, cache: KeyValueCache, dtype: torch.dtype) -> Job:
    mask = None
    if segment.start and not segment.prompt:
        device = cache.device
        seen = torch.arange(segment.end, device=device)[None, :]
        own = torch.arange(segment.start, segment.end, device=device)[:, None]
        mask = torch.zeros(segment.count, segment.end, dtype=dtype, device=device)
        mask.masked_fill_(seen > own, -torch.inf)
    rows, entry = slice(row, row + segment.count), cache.entry(segment.loop)
    return Job(rows, entry, segment.slot, 1, segment.end, mask, mask is None, segment.prompt, False)


def attend(job: Job, cache: KeyValueCache, layer: int, q_nhd: Tensor, kv_npd: Tensor) -> Tensor:
    """Context [rows, heads, d] of a job's rows; kv_npd [n, 2g, d]: the visit's new keys and values, stored already."""
    q_rhd = q_nhd[job.rows]
    rows, heads, dim = q_rhd.shape
    groups = kv_npd.shape[1] // 2
    if job.single:
        # Queries that share a key/value head are seen as its rows: all of them may look at the same positions.
        key, value = cache.view(layer, job.entry, job.slot, job.slots, job.length)
        context = F.scaled_dot_product_attention(q_rhd.view(rows, groups, -1, dim), key, value, attn_mask=job.mask)
        return context.reshape(rows, heads, dim)
    if job.prompt:
        new = kv_npd[job.rows].transpose(0, 1)[None]
        key, value = new[:, :groups], new[:, groups:]
    else:
        key, value = cache.view(layer, job.entry, job.slot, job.slots, job.length)
    context_1hrd = F.scaled_dot_product_attention(
        q_rhd.transpose(0, 1)[None],
        key,
        value,
        attn_mask=job.mask,
        is_causal=job.causal,
        enable_gqa=heads != groups,
    )
    return context_1hrd[0].transpose(0, 1)
