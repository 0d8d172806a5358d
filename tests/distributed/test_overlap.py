"""Overlapped gradient reduction and weight gather: the same weights, step after step, as without."""

from typing import Any

import numpy as np
import pytest

from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection
from ouro_megatron.training.engine import Engine
from tests.distributed.parity import Layout, batch, fill_reference, load, model_section, parallel_section, share
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM
from tests.reference.mapping import reference_config, to_megatron

pytestmark = pytest.mark.distributed


def train(layout: Layout) -> dict[str, Any]:
    """Three steps with and without overlap on the same batches; this rank's weights and losses of both."""
    context = create_context(parallel_section(layout))
    try:
        return {str(overlap): _train(layout, context, overlap) for overlap in (False, True)}
    finally:
        context.close()


def _train(layout: Layout, context: Any, overlap: bool) -> dict[str, np.ndarray]:
    model = model_section(layout)
    config = reference_config(model)
    reference = ReferenceLoopLM(config)
    fill_reference(reference)
    lm = LoopLM(model, context, recompute=layout.recompute, recompute_loops=layout.recompute_loops)
    load(lm, to_megatron(dict(reference.state_dict()), config))
    objective = ObjectiveSection(chunk_tokens=7)
    optimizer = OptimizerSection(lr=1e-2, eps=1e-4)
    engine = Engine(lm, context, objective, optimizer, loops=layout.loops, overlap=overlap, bucket_parameters=3000)
    assert engine.overlap is overlap
    engine.adopt_weights()
    found: dict[str, np.ndarray] = {}
    for step in range(3):
        mine = share(batch(layout.microbatches * layout.data * 2, seed=step), layout, context.data_rank)
        found[f"evaluated {step}"] = np.array(engine.evaluate(mine).means().ce)
        result = engine.train_step(mine, 1e-2)
        found[f"step {step}"] = np.array([*result.means.ce, result.grad_norm])
    found["after"] = np.array(engine.evaluate(mine).means().ce)
    if overlap:
        groups = engine.ddp.bucket_groups
        # Megatron puts the parameters of later pipeline ranks into one bucket.
        assert len(groups) > 1 or context.pipeline_rank > 0, "one bucket overlaps with nothing"
        weight = lm.decoder.layers[0].mlp.linear_fc1.weight
        counts = next(g.golden_per_param_grad_ready_counts for g in groups if weight in g.params)
        visits = layout.loops if layout.pipeline > 1 or layout.recompute == "full" else 1
        assert counts[weight] == visits
    for name, parameter in lm.named_global_parameters():
        found[name] = parameter.detach().numpy().copy()
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=2, loops=4),
        Layout(data=2, loops=3, recompute="full"),
        Layout(pipeline=2, data=2, loops=4, microbatches=4),
        Layout(pipeline=2, data=2, loops=2, microbatches=2, recompute="full", recompute_loops=1),
        Layout(tensor=2, data=2, loops=2, sequence_parallel=True),
        Layout(context=2, loops=4, recompute="full"),
        Layout(context=2, pipeline=2, loops=2),
    ],
    ids=str,
)
def test_overlap_changes_nothing(layout: Layout) -> None:
    for rank, found in enumerate(run_ranks(train, layout.ranks, layout)):
        for name, plain in found["False"].items():
            np.testing.assert_allclose(found["True"][name], plain, rtol=1e-5, atol=5e-6, err_msg=f"rank {rank}: {name}")
