"""What a recipe will need and how fast it will be on so many GPUs, before anything is launched."""

from dataclasses import dataclass, field
from functools import cached_property

from ouro_megatron.planning.cost import Costs, Traffic
from ouro_megatron.planning.flops import flops_per_token
from ouro_megatron.planning.hardware import GIB, Efficiency, Gpu
from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.memory import RankMemory, rank_memory
from ouro_megatron.planning.schedule import Timeline, simulate

RESERVE_BYTES = 1.5 * GIB
"""CUDA context, NCCL buffers and what the allocator cannot use: kept free on every GPU."""


@dataclass(frozen=True)
class Plan:
    """The plan of one layout on one kind of GPU. Everything is computed when it is asked for."""

    layout: Layout
    gpu: Gpu
    total_tokens: int | None
    """Budget of the stage; None where it is counted in epochs of data that was not read."""
    efficiency: Efficiency = field(default_factory=Efficiency)

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.layout, self.gpu, self.efficiency)

    @cached_property
    def memory(self) -> list[RankMemory]:
        """By pipeline rank."""
        return [rank_memory(self.layout, rank) for rank in range(self.layout.pipeline)]

    @property
    def peak_bytes(self) -> float:
        return max(memory.peak for memory in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak_bytes + RESERVE_BYTES <= self.gpu.memory_bytes

    @property
    def simulated_microbatches(self) -> int:
        """How many microbatches `timeline` runs: after these the schedule only repeats itself."""
        return min(self.layout.microbatches, 6 * self.layout.pipeline)

    @cached_property
    def timeline(self) -> Timeline:
        """Forwards and backwards of the step's first microbatches, simulated as if they were all."""
        layout, costs = self.layout, self.costs
        return simulate(
            layout.pipeline, layout.loops, self.simulated_microbatches, costs.task_seconds, costs.hop_seconds
        )

    @property
    def pictured_microbatches(self) -> int:
        """As many as a picture can show with room for their numbers."""
        return min(self.layout.microbatches, max(2 * self.layout.pipeline, 4))

    @property
    def pictured(self) -> Timeline:
        """The schedule of `pictured_microbatches`, its beginning and its end."""
        layout, costs = self.layout, self.costs
        return simulate(
            layout.pipeline, layout.loops, self.pictured_microbatches, costs.task_seconds, costs.hop_seconds
        )

    @property
    def _more(self) -> float:
        """Work of the whole step over the work of the timeline."""
        return self.layout.microbatches / self.simulated_microbatches

    @property
    def bubble_seconds(self) -> float:
        """Waiting in a step: at its ends only, so it does not grow with the microbatches."""
        return self.timeline.seconds - self.timeline.ideal

    @property
    def bubble(self) -> float:
        """`bubble_seconds` over the work of the busiest rank."""
        return self.bubble_seconds / (self.timeline.ideal * self._more)

    @property
    def traffic(self) -> list[Traffic]:
        """By pipeline rank, a step."""
        return [self.costs.traffic(rank) for rank in range(self.layout.pipeline)]

    @cached_property
    def tail_seconds(self) -> float:
        """Gradient reduction, optimizer and parameter gather after the last backward."""
        ranks = range(self.layout.pipeline)
        return max(self.costs.data_seconds(rank) + self.costs.optimizer_seconds(rank) for rank in ranks)

    @property
    def step_seconds(self) -> float:
        return self.timeline.ideal * self._more + self.bubble_seconds + self.tail_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.layout.step_tokens / self.step_seconds

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.layout.model, self.layout.sequence, training=self.layout.trains_model)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: useful work over the dense peak of all GPUs; recomputation does not count."""
        peak = self.gpu.peak("bf16" if self.layout.bytes_per_value == 2 else "fp32")
        return self.tokens_per_second * self.flops_per_token / (peak * self.layout.world)

    @property
    def days(self) -> float | None:
        return None if self.total_tokens is None else self.total_tokens / self.tokens_per_second / 86_400

    @property
    def gpu_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.layout.world

    def shares(self) -> dict[str, float]:
        """Where the step's seconds go on the busiest pipeline rank, as fractions that add up to 1."""
        layout, costs, timeline = self.layout, self.costs, self.timeline
        rank = max(range(layout.pipeline), key=timeline.busy)
        busy = timeline.busy(rank) * self._more
        traffic = costs.traffic(rank)
        exchanged = min(busy, traffic.tensor / costs.bandwidth(traffic.tensor_in_node))
        gathered = min(busy - exchanged, traffic.context / costs.bandwidth(traffic.context_in_node))
        head = 0.0
        if rank == layout.pipeline - 1:
            head = costs.head_seconds * layout.loops * layout.microbatches
        layers = busy - exchanged - gathered - head
        useful, forward = layers * (1.0 - costs.recomputed), costs.layer_parts
        parts = {
            **{name: useful * seconds / sum(forward.values()) for name, seconds in forward.items()},
            "recomputation": layers * costs.recomputed,
            "loss heads": head,
            "tensor-parallel exchange": exchanged,
            "context-parallel exchange": gathered,
            "bubble and waiting": self.bubble_seconds,
            "gradient reduction and optimizer": self.tail_seconds,
        }
        return {name: seconds / self.step_seconds for name, seconds in parts.items()}

    def limit(self) -> str:
        """What holds the layout back most, at most two things, and what to try."""
        if not self.fits:
            rank = max(range(self.layout.pipeline), key=lambda index: self.memory[index].peak)
            return _memory_advice(self, rank)
        shares = self.shares()
        worst = sorted(_ADVICE, key=lambda name: -shares[name])
        found = [
            f"{name}, {shares[name]:.0%} of the step: {_ADVICE[name]}" for name in worst[:2] if shares[name] >= 0.1
        ]
        own = f"the layers' own matrix products, {shares['matrix products']:.0%} of the step: as it should be"
        return "; ".join(found) or own


_ADVICE = {
    "attention": "the price of data.sequence_length; no layout changes it",
    "passes over memory": "they grow with hidden and feed-forward width as matrix products do with their square",
    "the host": "training.cuda_graphs, or larger pieces of work: batch.microbatch, a smaller parallel.tensor",
    "recomputation": "training.recompute=selective, or training.recompute_loops, as far as memory allows",
    "loss heads": "a smaller share of layers on the last rank (parallel.layers) or fewer pipeline ranks evens it out",
    "tensor-parallel exchange": "a smaller parallel.tensor, larger batch.microbatch, or parallel.sequence=true",
    "context-parallel exchange": "a smaller parallel.context, or fewer key and value heads (model.kv_heads)",
    "bubble and waiting": "more microbatches (a smaller batch.microbatch) or fewer pipeline ranks",
    "gradient reduction and optimizer": "fewer data-parallel ranks or a larger global batch",
}


def _memory_advice(plan: Plan, rank: int) -> str:
    memory, layout = plan.memory[rank], plan.layout
    need = (memory.peak + RESERVE_BYTES) / GIB
    what = max(
        ("activations", memory.activations),
        ("optimizer state", memory.optimizer),
        ("weights and gradients", memory.weights + memory.gradients),
        ("the loss head", memory.head),
        key=lambda part: part[1],
    )[0]
    cures = {
        "activations": "training.recompute=selective or full, a smaller batch.microbatch, a larger parallel.tensor or "
        "parallel.context",
        "optimizer state": "more data-parallel ranks or a larger parallel.tensor or parallel.pipeline",
        "weights and gradients": "a larger parallel.tensor or parallel.pipeline",
        "the loss head": "a smaller objective.chunk_tokens",
    }
    where = f"pipeline rank {rank}" if layout.pipeline > 1 else "every rank"
    return (
        f"memory: {where} needs {need:.1f} GiB of {plan.gpu.memory_bytes / GIB:.1f}, mostly {what}; try {cures[what]}"
    )
