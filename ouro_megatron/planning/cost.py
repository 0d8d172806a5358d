"""Seconds of one rank's tasks, and the bytes it sends over each kind of link."""

from dataclasses import dataclass
from functools import cached_property

from ouro_megatron.planning.hardware import Efficiency, Gpu
from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.memory import rank_parameters, widths
from ouro_megatron.planning.schedule import Task
from ouro_megatron.recipe.schema import Recompute

_AGAIN: dict[Recompute, float] = {"none": 0.0, "selective": 0.06, "full": 1.0}
"""Forwards that backward runs again."""


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends in one step, by purpose; and whether the partners of each sit in the same node."""

    tensor: float
    context: float
    pipeline: float
    data: float
    tensor_in_node: bool
    context_in_node: bool
    pipeline_in_node: bool
    data_in_node: bool

    def by_purpose(self, *, in_node: bool) -> dict[str, float]:
        """Bytes over NVLink inside the node, or over the network between nodes, by the kind of parallelism."""
        parts = {
            "tensor": (self.tensor, self.tensor_in_node),
            "context": (self.context, self.context_in_node),
            "pipeline": (self.pipeline, self.pipeline_in_node),
            "data": (self.data, self.data_in_node),
        }
        return {name: amount for name, (amount, inside) in parts.items() if inside is in_node and amount > 0}

    @property
    def in_node(self) -> float:
        return sum(self.by_purpose(in_node=True).values())

    @property
    def between_nodes(self) -> float:
        return sum(self.by_purpose(in_node=False).values())


class Costs:
    """Times of a layout on a GPU. Tensor-parallel ranks are neighbours, then context-, data-, pipeline-parallel."""

    def __init__(self, layout: Layout, gpu: Gpu, efficiency: Efficiency) -> None:
        self.layout = layout
        self.gpu = gpu
        self.efficiency = efficiency
        self._peak = gpu.peak("bf16" if layout.bytes_per_value == 2 else "fp32")
        self._node = gpu.node_bandwidth * efficiency.node
        self._network = gpu.network_bandwidth * efficiency.network

    # What shares a node

    def _inside(self, span: int) -> bool:
        """Whether a group that spans so many consecutive ranks fits into one node."""
        return span <= self.gpu.gpus_per_node

    @property
    def tensor_in_node(self) -> bool:
        return self._inside(self.layout.tensor)

    @property
    def context_in_node(self) -> bool:
        return self._inside(self.layout.tensor * self.layout.context)

    @property
    def data_in_node(self) -> bool:
        return self._inside(self.layout.tensor * self.layout.replicas)

    @property
    def pipeline_in_node(self) -> bool:
        return self._inside(self.layout.world)

    def bandwidth(self, in_node: bool) -> float:
        """Bytes a second that a GPU sends to one of its node, or to one of another."""
        return self._node if in_node else self._network

    # Compute

    @cached_property
    def layer_parts(self) -> dict[str, float]:
        """Seconds of the forward of one layer for one microbatch, by what it waits for in them."""
        layout, model = self.layout, self.layout.model
        query, key, ffn, _ = widths(layout)
        tokens = layout.tokens
        matmul = 2.0 * tokens * (model.hidden * (2 * query + 2 * key) + 3 * model.hidden * ffn)
        matmul *= 1 - layout.fp8_share + layout.fp8_share / self.efficiency.fp8_gain
        attention = 2.0 * tokens * query * layout.sequence
        reached = self.efficiency.attention * layout.sequence / (layout.sequence + self.efficiency.attention_ramp)
        split = layout.tensor if layout.sequence_parallel else 1
        # A third of what forward and backward read and write, in values a token: two norms, two norms with the residual
        # added, gradients of both streams (28), cutting and turning queries, keys and values (4), SwiGLU (8).
        values = (28 * model.hidden / split + 4 * (query + 2 * key) + 8 * ffn) / 3
        moved = layout.bytes_per_value * tokens * values
        parts = {
            "matrix products": matmul / (self._peak * self.efficiency.matmul),
            "attention": attention / (self._peak * reached),
            "passes over memory": moved / (self.gpu.memory_bandwidth * self.efficiency.memory),
        }
        host = self.efficiency.host_layer_seconds * (1 + layout.fp8_share * (self.efficiency.host_fp8 - 1))
        host *= not layout.cuda_graphs
        return parts | {"the host": max(0.0, host - sum(parts.values()))}

    @cached_property
    def layer_seconds(self) -> float:
        """Forward of one layer for one microbatch, communication of the tensor-parallel group included."""
        return sum(self.layer_parts.values()) + self._tensor_seconds(2)

    @property
    def recomputed(self) -> float:
        """Part of the layers' time that only makes again what was thrown away."""
        layout = self.layout
        if not layout.trains_model:
            return 0.0
        again = [_AGAIN[layout.recomputes(loop)] for loop in range(layout.loops)]
        return sum(again) / sum(3.0 + more for more in again)

    @property
    def _seen_bytes(self) -> float:
        """What a rank receives when the keys and values of one layer are gathered over its context-parallel group."""
        layout = self.layout
        return 2 * layout.bytes_per_value * layout.tokens * widths(layout)[1] * (layout.context - 1)

    @property
    def _context_seconds(self) -> float:
        """Of one gather of keys and values, or of the scatter of their gradients: nothing hides it."""
        if self.layout.context == 1:
            return 0.0
        return self._seen_bytes / self.bandwidth(self.context_in_node) + self.efficiency.latency_seconds

    def _tensor_seconds(self, exchanges: int) -> float:
        """All-reduces of one microbatch's hidden state in the tensor-parallel group (as much when split in two)."""
        tensor = self.layout.tensor
        if tensor == 1:
            return 0.0
        sent = 2 * (tensor - 1) / tensor * self._hidden_bytes()
        return exchanges * (sent / self.bandwidth(self.tensor_in_node) + 2 * self.efficiency.latency_seconds)

    def _hidden_bytes(self) -> float:
        return self.layout.bytes_per_value * self.layout.tokens * self.layout.model.hidden

    @cached_property
    def head_seconds(self) -> float:
        """Loss head of one loop: logits and both of their gradients, formed in the forward task of that loop."""
        layout, model = self.layout, self.layout.model
        vocab = widths(layout)[3]
        products = 3 if layout.trains_model else 1
        matmul = products * 2.0 * layout.tokens * vocab * model.hidden
        # Logits are read twice and overwritten once; a chunk's part of the weight's gradient is added in fp32.
        chunks = -(-layout.tokens // layout.chunk_tokens)
        moved = layout.bytes_per_value * layout.tokens * vocab * 3 + chunks * 8 * vocab * model.hidden
        seconds = matmul / (self._peak * self.efficiency.matmul)
        seconds += moved / (self.gpu.memory_bandwidth * self.efficiency.memory)
        if layout.tensor > 1:
            seconds += self._tensor_seconds(1) + chunks * 2 * 2 * self.efficiency.latency_seconds
        return seconds

    def task_seconds(self, rank: int, task: Task) -> float:
        """A forward or backward visit of `rank`'s layers; backward is two forwards, three when recomputing."""
        layout = self.layout
        layers = layout.layers[rank] * self.layer_seconds
        gathered = layout.layers[rank] * self._context_seconds
        if task.kind == "forward":
            return layers + gathered + (self.head_seconds if rank == layout.pipeline - 1 else 0.0)
        if not layout.trains_model:
            return 0.0
        again = _AGAIN[layout.recomputes(task.loop)]
        # Gathered once more, by a recomputed forward or in its place, and gradients scattered.
        return layers * (2.0 + again) + 2 * gathered

    # Communication

    @property
    def hop_bytes(self) -> float:
        """What one visit sends to the next pipeline rank."""
        return self._hidden_bytes() / (self.layout.tensor if self.layout.sequence_parallel else 1)

    @property
    def hop_seconds(self) -> float:
        if self.layout.pipeline == 1:
            return 0.0
        return self.hop_bytes / self.bandwidth(self.pipeline_in_node) + self.efficiency.latency_seconds

    def traffic(self, rank: int) -> Traffic:
        """What a rank at pipeline position `rank` sends in one step."""
        layout = self.layout
        visits = layout.loops * layout.microbatches
        tensor = 0.0
        if layout.tensor > 1:
            ring = 2 * (layout.tensor - 1) / layout.tensor * self._hidden_bytes()
            again = sum(layout.recomputes(loop) == "full" for loop in range(layout.loops)) / layout.loops
            tensor = visits * layout.layers[rank] * ring * (4 + 2 * again)
            if rank == layout.pipeline - 1:
                tensor += visits * ring
        pipeline = 0.0
        if layout.pipeline > 1:
            last, first = rank == layout.pipeline - 1, rank == 0
            forwards = visits - (layout.microbatches if last else 0)
            backwards = visits - (layout.microbatches if first else 0)
            pipeline = (forwards + (backwards if layout.trains_model else 0)) * self.hop_bytes
        return Traffic(
            tensor=tensor,
            context=visits * layout.layers[rank] * self._gathers * self._seen_bytes,
            pipeline=pipeline,
            data=self._data_bytes(rank),
            tensor_in_node=self.tensor_in_node,
            context_in_node=self.context_in_node,
            pipeline_in_node=self.pipeline_in_node,
            data_in_node=self.data_in_node,
        )

    @property
    def _gathers(self) -> int:
        """Exchanges of keys and values, or of their gradients, in one visit of one layer, backward included.

        Forward gathers, backward gathers again and scatters gradients. Recomputation gathers for its own backward.
        """
        return 3 if self.layout.trains_model else 1

    def _data_bytes(self, rank: int) -> float:
        layout = self.layout
        if layout.replicas == 1:
            return 0.0
        parameters = rank_parameters(layout, rank) if layout.trains_model else layout.model.hidden + 1
        # Gradients are scattered in fp32, weights gathered in the compute precision.
        return (layout.replicas - 1) / layout.replicas * parameters * (4 + layout.bytes_per_value)

    def data_seconds(self, rank: int) -> float:
        """Gradient reduction and parameter gather, which follow the last backward one after the other."""
        return self._data_bytes(rank) / self.bandwidth(self.data_in_node) + 4 * self.efficiency.latency_seconds

    def optimizer_seconds(self, rank: int) -> float:
        """Adam on this rank's share: about 40 bytes a parameter through memory, and the norm."""
        parameters = rank_parameters(self.layout, rank) / self.layout.replicas
        return 48 * parameters / (self.gpu.memory_bandwidth * self.efficiency.memory) + 2e-3
