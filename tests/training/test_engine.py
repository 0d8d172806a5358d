"""The engine by itself: what a step leaves behind."""

import gc

from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.training.engine import Engine
from tests.distributed.parity import Layout, batch, model_section, share


def test_the_garbage_collector_waits_for_the_end_of_a_step() -> None:
    layout = Layout(loops=2)
    context = create_context(ParallelSection())
    try:
        lm = LoopLM(model_section(layout), context)
        initialise(lm, 0)
        engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=2)
        engine.adopt_weights()
        inside: list[bool] = []

        def judge(means: LoopMeans, norm: float) -> None:
            inside.append(gc.isenabled())

        assert gc.isenabled()
        engine.train_step(share(batch(4), layout, 0), 1e-3, judge)
        assert inside == [False] and gc.isenabled()
    finally:
        context.close()
