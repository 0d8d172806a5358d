"""Which layers each pipeline rank holds. Pure arithmetic on the model's shape."""

from ouro_megatron.recipe.schema import Fp8Section, ModelSection


def relative_costs(model: ModelSection, sequence_length: int) -> tuple[float, float]:
    """Forward floating-point operations of (one layer, the loss head) for one token and one loop.

    Causal attention lets a token see half of the sequence on average. The embedding is a lookup and costs nothing here.
    """
    head_dim = model.head_dim or model.hidden // model.heads
    query, key = model.heads * head_dim, (model.kv_heads or model.heads) * head_dim
    matrices = model.hidden * (2 * query + 2 * key) + 3 * model.hidden * model.ffn
    return 2.0 * (matrices + query * sequence_length), 2.0 * model.vocab * model.hidden


def balanced_layers(model: ModelSection, pipeline: int, sequence_length: int = 0) -> list[int]:
    """Layers of each pipeline rank that make the slowest rank as fast as possible.

    The last rank also runs the loss head after every loop, so it gets fewer layers; where counts cannot be equal the
    earlier ranks get more. Each rank holds one layer at least: `pipeline` must not exceed the layers.
    """
    layer, head = relative_costs(model, sequence_length)
    counts = [1] * pipeline
    load = [layer] * (pipeline - 1) + [layer + head]
    for _ in range(model.layers - pipeline):
        rank = min(range(pipeline), key=lambda index: load[index])
        counts[rank] += 1
        load[rank] += layer
    return counts


def fp8_layers(model: ModelSection, fp8: Fp8Section | None) -> range:
    """The model's layers, counted from 0 over all pipeline ranks, whose products run in FP8 on every visit."""
    if fp8 is None:
        return range(0)
    return range(fp8.first_layers_bf16, model.layers - fp8.last_layers_bf16)
