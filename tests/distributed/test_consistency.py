"""Copies that are no longer equal are found, and named on every rank of their group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ouro_megatron.errors import TrainingError
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection
from ouro_megatron.recipe.spans import Span
from ouro_megatron.training.consistency import check_gradient_buffers, check_weights
from ouro_megatron.training.engine import Engine
from tests.distributed.parity import Layout, batch, model_section, parallel_section, share
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.stalls import STEP, StallingRanks

pytestmark = pytest.mark.distributed


def with_engine(layout: Layout, action: Callable[[Engine, int], Any], overlap: bool = False) -> Any:
    context = create_context(parallel_section(layout))
    try:
        lm = LoopLM(model_section(layout), context)
        initialise(lm, 0)
        engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-2), loops=layout.loops, overlap=overlap)
        engine.adopt_weights()
        return action(engine, context.rank)
    finally:
        context.close()


def weights_after_a_step(layout: Layout, tampered: str | None, overlap: bool) -> str:
    """Trains a step, then changes one bit of `tampered` on the last rank; returns what the check says."""

    def action(engine: Engine, rank: int) -> str:
        engine.train_step(share(batch(layout.microbatches * layout.data * 2), layout, engine.context.data_rank), 1e-2)
        if tampered is not None and rank == layout.ranks - 1:
            parameter = dict(engine.lm.named_global_parameters())[tampered]
            with torch.no_grad():
                parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))
        try:
            check_weights(engine)
        except TrainingError as error:
            return str(error)
        return ""

    return str(with_engine(layout, action, overlap))


@pytest.mark.parametrize("overlap", [False, True])
def test_equal_copies_pass(overlap: bool) -> None:
    assert run_ranks(weights_after_a_step, 4, Layout(tensor=2, data=2), None, overlap) == [""] * 4


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(context=2)], ids=str)
def test_a_bit_that_differs_between_data_parallel_ranks(layout: Layout) -> None:
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    for said in run_ranks(weights_after_a_step, 2, layout, name, False):
        assert "data-parallel ranks 0, 1" in said and name in said


def test_a_norm_that_differs_between_tensor_parallel_ranks() -> None:
    name = "decoder.layers.1.post_mlp_norm.weight"
    for said in run_ranks(weights_after_a_step, 2, Layout(tensor=2), name, False):
        assert "tensor-parallel ranks 0, 1" in said and name in said


def test_checked_by_default_and_while_a_run_goes_on(tmp_path: Path) -> None:
    assert tiny_recipe(tmp_path).training.check_every == Span(steps=100)
    recipe = tiny_recipe(
        tmp_path, name="flipped", parallel={"tensor": 2}, training={"device": "cpu", "check_every": "2 steps"}
    )
    with pytest.raises(TrainingError, match=r"tensor-parallel ranks 0, 1 hold different copies of decoder") as caught:
        StallingRanks(recipe, tmp_path / "flipped", 2, "tamper", 1).run()
    assert f"step {STEP + 1}, comparing weights between ranks" in str(caught.value)


def buffers() -> list[str]:
    def action(engine: Engine, rank: int) -> list[str]:
        check_gradient_buffers(engine)
        said = []
        weight = engine.lm.decoder.layers[0].mlp.linear_fc1.weight
        weight.main_grad = weight.main_grad.clone()
        try:
            check_gradient_buffers(engine)
        except TrainingError as error:
            said.append(str(error))
        return said

    return list(with_engine(Layout(), action))


def test_a_gradient_outside_the_buffer() -> None:
    assert "decoder.layers.0.mlp.linear_fc1.weight" in run_ranks(buffers, 1)[0][0]
