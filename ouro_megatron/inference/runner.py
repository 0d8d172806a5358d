"""One visit of the layers for rows of many sequences at different positions and loops; every tensor-parallel rank
calls it alike. Decides nothing: which rows go on, leave or are stored is the engine's business."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.inference.attention import Job, Segment, attend, plan_jobs
from ouro_megatron.inference.cache import CachePolicy, KeyValueCache
from ouro_megatron.inference.weights import LayerWeights, ModelWeights


@dataclass(frozen=True)
class Finish:
    """What becomes of a position after its last loop."""

    slot: int
    position: int
    loops_run: int


@dataclass(frozen=True)
class Visited:
    """Of each segment's last row, in the order of the segments."""

    gate_logits: list[float]
    changes: list[float]
    """|h_t - h_{t-1}| / |h_{t-1}|, where it was asked for; infinite at loop 1."""


@dataclass(frozen=True)
class Mix:
    """Adds weight * h of a position's current state to its sequence's running sum; `first` starts the sum anew."""

    slot: int
    position: int
    weight: float
    first: bool


@dataclass(frozen=True)
class Read:
    """Logits of a position's current state, or of its sequence's running sum."""

    slot: int
    position: int
    mixed: bool = False


class Runner:
    """A rank's weights, cache and states. `capacity` is the longest sequence in tokens, `loops` the most of any."""

    def __init__(
        self,
        weights: ModelWeights,
        *,
        policy: CachePolicy,
        loops: int,
        slots: int,
        capacity: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.weights = weights
        self.cache = KeyValueCache(weights, policy, loops, slots, capacity)
        self._capacity = capacity
        self._group = group if group is not None and group.size() > 1 else None
        hidden, device = weights.model.hidden, weights.device
        self._states = torch.empty(slots * capacity, hidden, dtype=weights.dtype, device=device)
        """The newest state of each position: h_t of the last loop t it went through."""
        self._sums = torch.zeros(slots, hidden, dtype=torch.float32, device=device)
        self._rotations = _rotations(capacity, weights.head_dim, weights.model.rope_base, device)
        self._eps = torch.tensor(weights.model.norm_eps, device=device)

    @torch.inference_mode()
    def visit(self, segments: list[Segment], finished: list[Finish], *, changes: bool = False) -> Visited:
        """Settles `finished` positions, then takes all segments' rows once through the layers, final norm and gate."""
        for item in finished:
            self._finish(item)
        if not segments:
            return Visited([], [])
        weights, device = self.weights, self.weights.device
        where = [s.slot * self._capacity + p for s in segments for p in range(s.start, s.end)]
        rows = torch.tensor(where, device=device)
        plan = _Plan(segments, self)
        before = x = self._inputs(segments, rows)
        for index, layer in enumerate(weights.layers):
            x = self._layer(index, layer, x, plan)
        x = self._norm(x, weights.final_norm_h)
        self._states.index_copy_(0, rows, x)
        ends = torch.tensor([s.count for s in segments], device=device).cumsum(0) - 1
        last = x.index_select(0, ends).float()
        gates = F.linear(last, weights.gate_1h, weights.gate_bias_1).flatten().tolist()
        return Visited(gates, self._changes(segments, before, last, ends) if changes else [torch.inf] * len(segments))

    def _changes(self, segments: list[Segment], before: Tensor, last: Tensor, ends: Tensor) -> list[float]:
        earlier = before.index_select(0, ends).float()
        relative = ((last - earlier).norm(dim=-1) / earlier.norm(dim=-1)).tolist()
        # What goes into loop 1 is the embedding, not a state.
        return [torch.inf if s.loop == 1 else value for s, value in zip(segments, relative, strict=True)]

    def _finish(self, item: Finish) -> None:
        if self.cache.policy == "all":
            self.cache.fill_deeper(item.slot, item.position, item.loops_run)
        else:
            self.cache.settle(item.slot, item.position, item.loops_run)

    def _inputs(self, segments: list[Segment], rows: Tensor) -> Tensor:
        """Embeddings where a segment begins at loop 1, states of the loop before elsewhere."""
        starting = [s.loop == 1 for s in segments for _ in range(s.count)]
        if not any(starting):
            return self._states.index_select(0, rows)
        tokens = torch.tensor([t for s in segments if s.loop == 1 for t in s.tokens], device=self.weights.device)
        embedded = self._embed(tokens)
        if all(starting):
            return embedded
        x = self._states.index_select(0, rows)
        x[torch.tensor(starting, device=x.device)] = embedded
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        weights = self.weights
        if self._group is None:
            return F.embedding(tokens, weights.embedding_vh)
        local = tokens - weights.vocab_start
        mine = (local >= 0) & (local < weights.embedding_vh.shape[0])
        embedded = F.embedding(local * mine, weights.embedding_vh) * mine[:, None]
        return self._reduce(embedded)

    def _layer(self, index: int, layer: LayerWeights, x_nh: Tensor, plan: "_Plan") -> Tensor:
        weights = self.weights
        heads, groups, dim = weights.heads, weights.groups, weights.head_dim
        qkv = layer.qkv(self._norm(x_nh, layer.input_norm_h)).view(-1, heads + 2 * groups, dim)
        _rotate(qkv[:, : heads + groups], plan.rotations)
        query, kv = qkv[:, :heads], qkv[:, heads:]
        plan.store(index, kv)
        if len(plan.jobs) == 1:
            context = attend(plan.jobs[0], self.cache, index, query, kv)
        else:
            context = torch.cat([attend(job, self.cache, index, query, kv) for job in plan.jobs])
        out = self._reduce(layer.out(context.reshape(-1, heads * dim)))
        x_nh = x_nh + self._norm(out, layer.post_attention_norm_h)
        gate, up = layer.gate_up(self._norm(x_nh, layer.mlp_norm_h)).chunk(2, dim=-1)
        down = self._reduce(layer.down(F.silu(gate).mul_(up)))
        return x_nh + self._norm(down, layer.post_mlp_norm_h)

    def _norm(self, x_nh: Tensor, weight_h: Tensor) -> Tensor:
        """RMSNorm in fp32, in half the time that torch's takes for a few rows on a CPU (docs/results)."""
        length_n1 = torch.linalg.vector_norm(x_nh, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square_n1 = torch.addcmul(self._eps, length_n1, length_n1, value=1.0 / x_nh.shape[-1])
        return (x_nh * mean_square_n1.rsqrt_() * weight_h).to(x_nh.dtype)

    def _reduce(self, partial: Tensor) -> Tensor:
        if self._group is not None:
            partial = partial.contiguous()
            dist.all_reduce(partial, group=self._group)
        return partial

    @torch.inference_mode()
    def logits(self, mixes: list[Mix], reads: list[Read]) -> Tensor:
        """fp32 [reads, vocab], after the sums have taken up `mixes`."""
        for mix in mixes:
            state = self._states[mix.slot * self._capacity + mix.position].float() * mix.weight
            if mix.first:
                self._sums[mix.slot] = state
            else:
                self._sums[mix.slot] += state
        if not reads:
            return torch.empty(0, self.weights.model.vocab)
        states = [
            self._sums[read.slot].to(self.weights.dtype)
            if read.mixed
            else self._states[read.slot * self._capacity + read.position]
            for read in reads
        ]
        logits = self.weights.head(torch.stack(states))
        if self._group is not None:
            shards = [torch.empty_like(logits) for _ in range(self._group.size())]
            dist.all_gather(shards, logits.contiguous(), group=self._group)
            logits = torch.cat(shards, dim=-1)
        return logits.float()


class _Plan:
    """What is the same in every layer of one visit."""

    def __init__(self, segments: list[Segment], runner: Runner) -> None:
        cache, device = runner.cache, runner.weights.device
        self._cache, self._segments = cache, segments
        loops = [s.loop for s in segments for _ in range(s.count)]
        slots = [s.slot for s in segments for _ in range(s.count)]
        positions = [p for s in segments for p in range(s.start, s.end)]
        self.jobs: list[Job] = plan_jobs(segments, cache, runner.weights.dtype)
        self.rotations = runner._rotations.index_select(0, torch.tensor(positions, device=device))[:, None]
        self._rows = cache.rows(loops, slots, positions)
        self._shared = cache.policy not in ("all", "last")
        if self._shared:
            self._decoding = all(not s.prompt for s in segments)
            self._slots = torch.tensor([s.slot for s in segments], device=device)
            places = {first: [i for i, s in enumerate(segments) if (s.loop == 1) == first] for first in (True, False)}
            self._places = {first: torch.tensor(where, device=device) for first, where in places.items() if where}

    def store(self, layer: int, kv_npd: Tensor) -> None:
        """Puts the visit's new keys and values where this loop's attention and later tokens look for them."""
        if not self._shared:
            self._cache.write(layer, self._rows, kv_npd)
        elif self._decoding:
            self._store_tokens(layer, kv_npd)
        else:
            self._store_segments(layer, kv_npd)

    def _store_tokens(self, layer: int, kv_npd: Tensor) -> None:
        """One row a segment: the cache takes this loop's, the notes what `settle` will put there."""
        cache = self._cache
        cache.write(layer, self._rows, kv_npd)
        for first, which in self._places.items():
            if first or cache.policy == "average":
                cache.note_own(layer, first, self._slots[which], kv_npd[which])

    def _store_segments(self, layer: int, kv_npd: Tensor) -> None:
        """Prompts among the segments: their shared entries are made at once, as each loop attends to its own rows."""
        cache, pairs, row = self._cache, kv_npd.shape[1], 0
        for segment in self._segments:
            end = row + segment.count
            rows, kv = self._rows[row * pairs : end * pairs], kv_npd[row:end]
            if segment.prompt and cache.policy == "average":
                cache.write_mean(layer, segment.loop, rows, kv)
            elif segment.loop == 1 or not segment.prompt:
                cache.write(layer, rows, kv)
            if not segment.prompt and (segment.loop == 1 or cache.policy == "average"):
                cache.note_own(layer, segment.loop == 1, self._slots.new_tensor([segment.slot]), kv)
            row = end


def _rotations(capacity: int, dim: int, base: float, device: torch.device) -> Tensor:
    """e^(i angle) for each position and pair, complex64 [capacity, d / 2]; angles as in training (fp32)."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    angles = torch.arange(capacity, dtype=torch.float32, device=device)[:, None] / (base**exponent)
    return torch.polar(torch.ones_like(angles), angles)


def _rotate(x_nkd: Tensor, rotations: Tensor) -> None:
    """RoPE in place on heads whose halves are interleaved: each neighbouring pair is one complex number."""
    if x_nkd.dtype == torch.float32:
        torch.view_as_complex(x_nkd.unflatten(-1, (-1, 2))).mul_(rotations)
        return
    pairs = torch.view_as_complex(x_nkd.float().unflatten(-1, (-1, 2)))
    x_nkd.copy_(torch.view_as_real(pairs.mul_(rotations)).flatten(-2))
