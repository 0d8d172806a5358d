"""How layers are shared out over pipeline ranks."""

from hypothesis import given
from hypothesis import strategies as st

from ouro_megatron.recipe.layers import balanced_layers, relative_costs
from ouro_megatron.recipe.schema import ModelSection


def model(layers: int, vocab: int = 49_152) -> ModelSection:
    return ModelSection(layers=layers, hidden=2048, heads=16, ffn=5632, vocab=vocab, loops=4)


def test_published_shapes() -> None:
    # A head costs as much as about two layers: 2 * 49,152 * 2048 against 2 * 51.4 M.
    assert balanced_layers(model(24), 1) == [24]
    assert balanced_layers(model(24), 2) == [13, 11]
    assert balanced_layers(model(24), 4, 4096) == [7, 6, 6, 5]
    assert balanced_layers(model(48), 8, 4096) == [7, 6, 6, 6, 6, 6, 6, 5]


@given(st.integers(1, 60), st.integers(1, 16), st.sampled_from([64, 49_152, 500_000]))
def test_nothing_is_lost_and_no_move_helps(layers: int, pipeline: int, vocab: int) -> None:
    pipeline = min(pipeline, layers)
    counts = balanced_layers(model(layers, vocab), pipeline)
    assert sum(counts) == layers and len(counts) == pipeline and min(counts) >= 1
    layer, head = relative_costs(model(layers, vocab), 0)
    loads = [count * layer for count in counts]
    loads[-1] += head
    slowest = max(loads)
    for giver in range(pipeline):
        for taker in range(pipeline):
            if giver != taker and counts[giver] > 1:
                moved = list(loads)
                moved[giver] -= layer
                moved[taker] += layer
                assert max(moved) >= slowest - 1e-6
