"""Recorded visits of the layers (CUDA graphs) against the same steps without them."""

import pytest
import torch

from ouro_megatron.recipe.schema import Fp8Section, Recompute
from ouro_megatron.training.engine import Engine
from tests.gpu.steps import MODEL, Step, engine_of, microbatches, needs_transformer_engine, on_gpu, step_of

WAYS = [
    ("local", None, "none"),
    ("local", None, "selective"),
    ("transformer_engine", None, "none"),
    ("transformer_engine", None, "selective"),
    ("transformer_engine", "current", "none"),
    ("transformer_engine", "current", "selective"),
    ("transformer_engine", "blockwise", "none"),
]


def steps_of(engine: Engine, count: int = 3) -> tuple[list[Step], float]:
    """Gradients of each of `count` steps before its update, and the loss of an evaluation afterwards."""
    steps = []
    for _ in range(count):
        steps.append(step_of(engine))
        engine.update(engine.accumulate(microbatches(engine.context.device)), 1e-2)
        assert (engine.lm.graphs is not None) == engine.cuda_graphs
    held_out = engine.evaluate(microbatches(engine.context.device)).means().loss
    engine.lm.graphs = None
    engine.lm.weights_changed()
    made_anew = engine.evaluate(microbatches(engine.context.device)).means().loss
    assert made_anew == pytest.approx(held_out, rel=1e-6), "copies of weights in 8 bits were stale"
    return steps, held_out


@pytest.mark.parametrize(("implementation", "fp8", "recompute"), WAYS)
def test_graphs_change_nothing(implementation: str, fp8: str | None, recompute: Recompute) -> None:
    """The first step makes the kernels without graphs; all others replay them, with weights that changed meanwhile."""
    if implementation == "transformer_engine":
        needs_transformer_engine()
    section = None if fp8 is None else Fp8Section(recipe=fp8)
    runs = []
    with on_gpu() as context:
        for graphs in (False, True):
            engine = engine_of(context, implementation, fp8=section, recompute=recompute, lr=1e-2, cuda_graphs=graphs)
            runs.append(steps_of(engine))
    (plain, plain_held_out), (replayed, held_out) = runs
    for with_graphs, without in zip(replayed, plain, strict=True):
        assert with_graphs.loss == pytest.approx(without.loss, rel=2e-3)
    # Updates amplify rounding: gradients are compared where both sides still have the same weights.
    assert replayed[0].distance(plain[0]) < 1e-3
    assert held_out == pytest.approx(plain_held_out, rel=2e-2)
    assert replayed[-1].loss < replayed[0].loss - 0.05


@pytest.mark.parametrize("fp8", [None, "current"])
def test_replayed_gradients_equal_those_without_graphs(fp8: str | None) -> None:
    """The same weights, step after step: replays repeat, and follow loops and shapes that change."""
    needs_transformer_engine()
    section = None if fp8 is None else Fp8Section(recipe=fp8)
    with on_gpu() as context:
        engine = engine_of(context, "transformer_engine", fp8=section, cuda_graphs=True)
        plain = step_of(engine)
        replayed = [step_of(engine) for _ in range(3)]
        assert engine.lm.graphs is not None
        assert all(step.distance(plain) < 1e-3 for step in replayed)
        assert replayed[0].distance(replayed[2]) < 1e-5
        for loops in (MODEL.loops - 1, MODEL.loops):
            engine.set_loops(loops)
            replayed.append(step_of(engine))
            assert engine.lm.graphs.loops == loops
        assert replayed[-1].distance(plain) < 1e-3
        halves = [type(b)(b.tokens_bs[:1], b.labels_bs[:1], b.mask_bs[:1]) for b in microbatches(context.device)]
        means = engine.accumulate(halves)
        assert engine.lm.graphs.shape[1] == 1
        engine.cuda_graphs, engine.lm.graphs = False, None
        assert engine.accumulate(halves).loss == pytest.approx(means.loss, rel=1e-4)


def test_a_second_microbatch_before_backward_is_refused() -> None:
    with on_gpu() as context:
        engine = engine_of(context, "local", cuda_graphs=True)
        for _ in range(2):
            step_of(engine)
        graphs = engine.lm.graphs
        assert graphs is not None
        h_sbh = torch.zeros(graphs.shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        graphs(h_sbh, 0)
        with pytest.raises(RuntimeError, match="overwritten before its backward"):
            graphs(h_sbh, 0)
