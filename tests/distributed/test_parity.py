"""Every parallel layout gives the reference's loss, gradients and updated weights."""

import pytest

from tests.distributed.parity import Layout, compare
from tests.distributed.ranks import run_ranks

LAYOUTS = [
    # one rank: the loop itself
    Layout(),
    Layout(loops=1),
    Layout(loops=2, kv_heads=2),
    Layout(recompute="full"),
    Layout(prior="geometric"),
    Layout(kind="gate"),
    # data parallel
    Layout(data=2),
    Layout(data=4, loops=2, microbatches=1),
    # tensor parallel
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True, recompute="full"),
    Layout(tensor=2, sequence_parallel=True, kind="gate"),
    Layout(tensor=2, loops=1, sequence_parallel=True),
    # the looped pipeline
    Layout(pipeline=2, loops=1),
    Layout(pipeline=2, loops=2),
    Layout(pipeline=2, loops=4, microbatches=4),
    Layout(pipeline=2, loops=3, microbatches=6, recompute="full"),
    Layout(pipeline=4, loops=1, microbatches=8),
    Layout(pipeline=4, loops=2, microbatches=4),
    Layout(pipeline=4, loops=4, microbatches=8),
    Layout(pipeline=2, data=2, kind="gate"),
    Layout(pipeline=2, data=2, prior="geometric", microbatches=4),
    # all together
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, pipeline=2, loops=2, sequence_parallel=True, microbatches=4),
    Layout(tensor=2, pipeline=2, sequence_parallel=True, recompute="full", kv_heads=2),
    Layout(tensor=2, pipeline=2, kind="gate", sequence_parallel=True),
    Layout(tensor=2, data=2, loops=2, sequence_parallel=True),
    Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True),
    Layout(tensor=2, pipeline=4, loops=4, microbatches=8),
]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_reference(layout: Layout) -> None:
    results = run_ranks(compare, layout.ranks, layout)
    assert sum(result.gradients_compared for result in results) > 0
    for rank, result in enumerate(results):
        assert result.loss < 2e-6, (rank, result)
        assert result.evaluation < 2e-6, (rank, result)
        assert result.ce < 2e-6, (rank, result)
        assert result.grad_norm < 5e-6, (rank, result)
        assert result.gradient < 5e-5, (rank, result)
        assert result.weight < 5e-6, (rank, result)
