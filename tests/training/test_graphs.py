"""Steps that replay recorded visits of the layers, against the same steps without; tests/gpu has real CUDA graphs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_megatron.errors import RecipeError
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, context_for, create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection, ParallelSection, Recompute
from ouro_megatron.recipe.validate import check_recipe
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.parity import Layout, batch, model_section, share
from tests.tiny import tiny_recipe
from tests.training.cpu_graphs import record_on_the_cpu

LAYOUT = Layout(loops=3)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[ParallelContext]:
    record_on_the_cpu(monkeypatch)
    made = create_context(ParallelSection())
    yield made
    made.close()


def engine_of(
    context: ParallelContext, graphs: bool, recompute: Recompute = "none", kind: str = "expected_loss"
) -> Engine:
    lm = LoopLM(model_section(LAYOUT), context, recompute=recompute)
    initialise(lm, 0)
    objective = ObjectiveSection(kind=kind, chunk_tokens=7)
    engine = Engine(lm, context, objective, OptimizerSection(lr=1e-2), loops=LAYOUT.loops, cuda_graphs=graphs)
    engine.adopt_weights()
    return engine


def microbatches(seed: int) -> list[Microbatch]:
    return share(batch(4, seed=seed), LAYOUT, 0)


def gradients(engine: Engine) -> dict[str, Tensor]:
    named = engine.lm.named_global_parameters()
    return {name: p.main_grad.clone() for name, p in named if p.requires_grad}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["expected_loss", "last_loop"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_replayed_steps_have_the_gradients_of_steps_without_graphs(
    context: ParallelContext, recompute: Recompute, kind: str
) -> None:
    plain, replaying = (engine_of(context, graphs, recompute, kind) for graphs in (False, True))
    for step in range(4):
        data = microbatches(step)
        means = [engine.accumulate(data) for engine in (plain, replaying)]
        assert means[1].loss == pytest.approx(means[0].loss, rel=1e-6)
        wanted, found = gradients(plain), gradients(replaying)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)
        for engine, mean in zip((plain, replaying), means, strict=True):
            engine.update(mean, 1e-2)
        assert (replaying.lm.graphs is not None) == (step > 0), "the first step makes the kernels"
        held_out = [engine.evaluate(microbatches(9)).means().loss for engine in (plain, replaying)]
        assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


def test_each_microbatch_replays_each_loop_once_and_parameters_are_their_own_again(context: ParallelContext) -> None:
    engine = engine_of(context, True)
    parameters = dict(engine.lm.named_parameters())
    for _ in range(3):
        engine.train_step(microbatches(0), 1e-2)
    graphs = engine.lm.graphs
    assert graphs is not None
    visits = graphs._visits
    assert len(visits) == LAYOUT.loops
    # Two steps of two microbatches.
    assert [graph.replays for visit in visits for graph in (visit.forward, visit.backward)] == [4] * 6  # type: ignore[attr-defined]
    assert all(parameter is parameters[name] for name, parameter in engine.lm.named_parameters())


def test_other_loops_and_other_shapes_are_recorded_anew(context: ParallelContext) -> None:
    engine, plain = engine_of(context, True), engine_of(context, False)
    for _ in range(2):
        engine.accumulate(microbatches(0))
    first = engine.lm.graphs
    engine.accumulate(microbatches(1))
    assert engine.lm.graphs is first
    for changed in (engine, plain):
        changed.set_loops(2)
    assert engine.accumulate(microbatches(1)).loss == pytest.approx(plain.accumulate(microbatches(1)).loss, rel=1e-6)
    assert engine.lm.graphs is not None and engine.lm.graphs.loops == 2
    single = [Microbatch(b.tokens_bs[:1], b.labels_bs[:1], b.mask_bs[:1]) for b in microbatches(1)]
    assert engine.accumulate(single).loss == pytest.approx(plain.accumulate(single).loss, rel=1e-6)
    assert engine.lm.graphs.shape[1] == 1


def test_the_gate_stage_records_nothing(context: ParallelContext) -> None:
    engine = engine_of(context, True, kind="gate")
    for _ in range(3):
        engine.train_step(microbatches(0), 1e-2)
    assert engine.lm.graphs is None


def test_a_second_microbatch_before_backward_is_refused(context: ParallelContext) -> None:
    engine = engine_of(context, True)
    for _ in range(2):
        engine.accumulate(microbatches(0))
    graphs = engine.lm.graphs
    assert graphs is not None
    h_sbh = torch.zeros(graphs.shape, requires_grad=True)
    graphs(h_sbh, 0)
    with pytest.raises(RuntimeError, match="overwritten before its backward"):
        graphs(h_sbh, 0)


GRAPHS = {"cuda_graphs": True, "device": "auto"}


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"training": {**GRAPHS, "device": "cpu"}}, "training.device=cpu"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor=2"),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline=2"),
        ({"parallel": {"overlap": True}}, "parallel.overlap=true"),
        ({"training": {**GRAPHS, "recompute": "full"}}, "training.recompute=full"),
        ({"data": {"packing": "best_fit", "sequence_length": 64}}, "data.packing"),
        ({"data": {"sequence_length": 96}}, "data.sequence_length=96"),
        ({"precision": {"compute": "bf16", "fp8": {"emulate": True}}}, "precision.fp8"),
    ],
)
def test_what_graphs_cannot_go_with_is_refused(tmp_path: Path, sections: dict[str, Any], field: str) -> None:
    fits: dict[str, Any] = {"training": GRAPHS, "data": {"sequence_length": 64}}
    check_recipe(tiny_recipe(tmp_path, **fits))
    with pytest.raises(RecipeError, match=r"training\.cuda_graphs=true") as caught:
        check_recipe(tiny_recipe(tmp_path, **{**fits, **sections}))
    assert field in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_without_a_gpu_are_refused_before_any_group_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="torch sees no GPU"):
        context_for(tiny_recipe(tmp_path, training=GRAPHS, data={"sequence_length": 64}))
    assert not torch.distributed.is_initialized()
