"""Bytes of one rank: weights, gradients, optimizer, activations of the visits in flight, loss head, working space.

Counted from what the local layer spec keeps for backward (`model/`, `objective/head.py`);
tests compare the counts with the storages that autograd really holds.
"""

from dataclasses import dataclass

from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.schedule import most_held, most_in_flight
from ouro_megatron.recipe.schema import Recompute


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage."""

    parameters: int
    """Number of parameters the rank stores, not bytes."""
    weights: float
    gradients: float
    """Megatron's fp32 gradient buffer."""
    optimizer: float
    """This data- and context-parallel rank's share of Adam's moments and, in bf16, the fp32 weights."""
    activations: float
    """At the moment when most is held."""
    visits_in_flight: int
    head: float
    """Logits of one chunk and what becomes of them."""
    working: float
    """The largest temporary need of a backward task."""
    update: float
    """Temporary need of the optimizer's step, which comes when the activations are gone. Torch's Adam on a GPU makes
    one more fp32 copy of this rank's share; Transformer Engine's and apex's none."""

    @property
    def peak(self) -> float:
        visits = self.activations + max(self.head, self.working)
        return self.weights + self.gradients + self.optimizer + max(visits, self.update)


def widths(layout: Layout) -> tuple[int, int, int, int]:
    """A tensor-parallel rank's share of (query width, key width, feed-forward width, vocabulary)."""
    model, tensor = layout.model, layout.tensor
    head_dim = model.head_dim or model.hidden // model.heads
    keys = model.kv_heads or model.heads
    return model.heads * head_dim // tensor, keys * head_dim // tensor, model.ffn // tensor, model.vocab // tensor


def rank_parameters(layout: Layout, rank: int) -> int:
    """Parameters that pipeline rank `rank` (and each of its tensor-parallel ranks) stores."""
    model = layout.model
    query, key, ffn, vocab = widths(layout)
    layer = model.hidden * (2 * query + 2 * key) + 3 * model.hidden * ffn + 4 * model.hidden
    count = layout.layers[rank] * layer
    if rank == 0:
        count += vocab * model.hidden
    if rank == layout.pipeline - 1:
        count += vocab * model.hidden + model.hidden + model.hidden + 1
    return count


def layer_bytes(layout: Layout, mode: Recompute) -> float:
    """What one layer keeps for backward of one microbatch's visit, its input included."""
    model, tokens, size = layout.model, layout.tokens, layout.bytes_per_value
    split = layout.tensor if layout.sequence_parallel else 1
    hidden = model.hidden / split
    if mode == "full":
        return size * tokens * hidden
    query, key, ffn, _ = widths(layout)
    # The layer's input, the results of both sub-layers (inputs of their post-norms) and the stream between them.
    values = 4 * hidden
    head_dim = model.head_dim or model.hidden // model.heads
    values += query + 2 * key + query  # queries, keys and values, the attention's result
    # One kernel on CUDA cuts queries, keys and values apart and turns them. In plain torch the joint projection is what
    # is kept, values are a view of it, and turned queries and keys are kept besides, with cosines and sines of both.
    in_one = layout.on_gpu and head_dim & (head_dim - 1) == 0
    if not in_one:
        values += query + key
    values += 2 * ffn
    if layout.context > 1:
        values += query  # the attention's result once more, of each slice by itself
    if mode == "none":
        values += 2 * hidden + ffn  # both pre-norms' results, SwiGLU's result
    norm_scales = 4 * 4 * tokens / split
    softmax_sums = 4 * tokens * model.heads / layout.tensor
    rotary = (
        0 if in_one else 4 * layout.sequence // layout.context * head_dim * size
    )  # cosine and sine, for queries and for keys
    return size * tokens * values + norm_scales + softmax_sums + rotary


def visit_bytes(layout: Layout, rank: int, loop: int) -> float:
    """What one visit (a microbatch's pass through the rank's layers in `loop`, from 0) keeps until its backward."""
    if not layout.trains_model:
        return 0.0
    tokens, size = layout.tokens, layout.bytes_per_value
    split = layout.tensor if layout.sequence_parallel else 1
    hidden = tokens * layout.model.hidden / split
    kept = layout.layers[rank] * layer_bytes(layout, layout.recomputes(loop))
    if layout.pipeline > 1:
        kept += size * hidden  # the schedule holds what it sent until the gradient comes back
    if rank == layout.pipeline - 1:
        kept += size * hidden + 4 * tokens / split  # final norm
        kept += size * hidden  # gradient of the loss head, formed in forward
        kept += (4 * hidden if size == 2 else 0) + 10 * 4 * tokens  # the gate's fp32 input; its scalars and the losses
    return kept


def head_bytes(layout: Layout) -> float:
    """Temporary need of the loss head on the last pipeline rank (a CPU in bf16 needs a chunk in fp32 besides)."""
    model, size = layout.model, layout.bytes_per_value
    chunk, vocab = min(layout.chunk_tokens, layout.tokens), widths(layout)[3]
    hidden = layout.tokens * model.hidden * size
    gathered = hidden if layout.sequence_parallel else 0.0
    # A chunk's gradient takes the memory of its logits (on CUDA; a CPU in bf16 needs fp32 logits besides).
    return size * chunk * vocab + hidden + gathered


def working_bytes(layout: Layout, loop: int) -> float:
    """Temporary need of one layer's backward: gradients of its activations and, when recomputing, these themselves."""
    model, size = layout.model, layout.bytes_per_value
    _, _, ffn, _ = widths(layout)
    if not layout.trains_model:  # no backward: the largest of forward
        return size * layout.tokens * (3 * ffn + 3 * model.hidden) + gather_buffer(layout)
    feed_forward = size * layout.tokens * (6 * ffn + 3 * model.hidden) + size * 2 * ffn * model.hidden
    gradients = max(feed_forward, exchange_bytes(layout))
    again = layer_bytes(layout, "none") if layout.recomputes(loop) == "full" else 0.0
    return gradients + again + gather_buffer(layout)


def exchange_bytes(layout: Layout) -> float:
    """Temporary need of attention's backward over a cut sequence: keys and values of the whole one, gathered, their
    gradients, and these in the order in which they are sent back."""
    if layout.context == 1:
        return 0.0
    query, key, _, _ = widths(layout)
    whole = 2 * key * layout.tokens * layout.context
    return layout.bytes_per_value * (3 * whole + 4 * query * layout.tokens)


def gather_buffer(layout: Layout) -> float:
    """Megatron's one buffer for gathered inputs under sequence parallelism."""
    if not layout.sequence_parallel or layout.tensor == 1:
        return 0.0
    return layout.bytes_per_value * layout.tokens * layout.model.hidden


def rank_memory(layout: Layout, rank: int) -> RankMemory:
    """Memory of the ranks at pipeline position `rank`."""
    parameters = rank_parameters(layout, rank)
    size = layout.bytes_per_value
    trained = parameters if layout.trains_model else layout.model.hidden + 1
    # The most is held once the pipeline is full: more microbatches change nothing.
    shape = (layout.pipeline, rank, layout.loops, min(layout.microbatches, 4 * layout.pipeline))
    working = max(working_bytes(layout, loop) for loop in range(layout.loops))
    return RankMemory(
        parameters=parameters,
        weights=parameters * size,
        gradients=4.0 * trained,
        optimizer=trained * (12 if size == 2 else 8) / layout.replicas,
        activations=most_held(*shape, lambda loop: visit_bytes(layout, rank, loop)),
        visits_in_flight=most_in_flight(*shape),
        head=head_bytes(layout) if rank == layout.pipeline - 1 else 0.0,
        working=working,
        update=4.0 * trained / layout.replicas,
    )
