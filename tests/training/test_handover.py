"""Stages that follow each other: what carries over, loops that change on the way, the lineage in the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.checkpoint.state import read_state, tokens_in_all
from ouro_megatron.errors import OuroError, RecipeError
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection, ParallelSection, Recipe
from ouro_megatron.recipe.validate import check_recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EventRecord, StepRecord
from ouro_megatron.training.engine import Engine
from tests.distributed.parity import Layout, batch, gradient_of, model_section, share
from tests.distributed.ranks import RankFailure, run_ranks
from tests.tiny import tiny_recipe
from tests.training.test_resume import LAYOUTS, losses, ranks_of, stage, train

pytestmark = pytest.mark.distributed
CONSTANT: dict[str, Any] = {"schedule": {"warmup": 0}}


def events(recipe: Recipe, name: str) -> list[str]:
    records = read_records(recipe.run_folder / "metrics.jsonl")
    return [record.message for record in records if isinstance(record, EventRecord) and record.name == name]


def change_loops(layout: Layout, loops: int) -> tuple[float, int]:
    """Largest difference in loss and any gradient between an engine that changed T and a fresh one at that T."""
    context = create_context(ParallelSection(tensor=layout.tensor, pipeline=layout.pipeline))
    try:
        return _change_loops(layout, loops, context)
    finally:
        context.close()


def _engine(layout: Layout, loops: int, context: ParallelContext) -> Engine:
    lm = LoopLM(model_section(layout), context)
    engine = Engine(lm, context, ObjectiveSection(chunk_tokens=7), OptimizerSection(lr=1e-3), loops=loops)
    engine.keep_whole_gradients = True
    return engine


def _change_loops(layout: Layout, loops: int, context: ParallelContext) -> tuple[float, int]:
    changed = _engine(layout, layout.loops, context)
    generator = torch.Generator().manual_seed(3 + context.pipeline_rank)
    with torch.no_grad():
        for parameter in changed.lm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.dim() == 1))
    changed.adopt_weights()
    mine = share(batch(layout.microbatches * layout.data * 2), layout, context.data_rank)
    for _ in range(2):
        changed.train_step(mine, 1e-3)
    changed.set_loops(loops)
    fresh = _engine(layout, loops, context)
    with torch.no_grad():
        for old, new in zip(changed.lm.parameters(), fresh.lm.parameters(), strict=True):
            new.copy_(old)
    fresh.adopt_weights()
    first, second = changed.accumulate(mine), fresh.accumulate(mine)
    worst, compared = abs(first.loss - second.loss), 0
    for old, new in zip(changed.lm.parameters(), fresh.lm.parameters(), strict=True):
        worst = max(worst, float((gradient_of(old) - gradient_of(new)).abs().max()))
        compared += int(bool(gradient_of(new).abs().max() > 0))
    assert len(first.ce) == loops
    return worst, compared


@pytest.mark.parametrize(
    ("layout", "loops"),
    [
        (Layout(loops=4), 2),
        (Layout(loops=2), 4),
        (Layout(pipeline=2, data=2, loops=4), 2),
        (Layout(pipeline=2, loops=3), 1),
        (Layout(pipeline=2, tensor=2, loops=1), 2),
    ],
    ids=str,
)
def test_after_a_change_of_loops_all_gradients_are_a_fresh_runs(layout: Layout, loops: int) -> None:
    for worst, compared in run_ranks(change_loops, layout.ranks, layout, loops):
        assert worst == 0.0
        assert compared > 5


LOOPS: dict[str, Any] = {
    "model": {"loops": 2},
    "training": {"early_loops": [{"loops": 4, "until": "4 steps"}, {"loops": 3, "until": "7 steps"}]},
    "batch": {"global_tokens": 256, "ramp": [{"after": "5 steps", "global_tokens": 512}]},
}


@pytest.mark.parametrize("layout", ["1x1", "pp2dp2"])
def test_loops_and_batch_change_inside_a_stage_and_resume_is_exact(tmp_path: Path, layout: str) -> None:
    straight = train(tmp_path, layout, name="straight", budget={"total": "10 steps"}, **LOOPS)
    steps = [r for r in read_records(straight.run_folder / "metrics.jsonl") if isinstance(r, StepRecord)]
    assert [len(step.loops.ce) for step in steps] == [4, 4, 4, 4, 3, 3, 3, 2, 2, 2]
    assert [step.global_tokens for step in steps] == [256] * 5 + [512] * 5
    assert events(straight, "loops") == ["4 -> 3 loops from step 5 on", "3 -> 2 loops from step 8 on"]
    for stop in (4, 6):
        halves = tiny_recipe(
            tmp_path,
            name=f"halves-{stop}",
            budget={"total": "10 steps"},
            checkpoint={"every": f"{stop} steps"},
            parallel={"timeout_seconds": 60, **LAYOUTS[layout]},
            **LOOPS,
        )
        run_ranks(stage_until, ranks_of(layout), halves, stop)
        assert len(losses(halves)) == stop
        run_ranks(stage, ranks_of(layout), halves)
        assert losses(halves) == losses(straight)


def stage_until(recipe: Recipe, step: int) -> bool:
    """Trains like a run that is told to stop after `step` steps."""
    from ouro_megatron.training.callbacks import Stopping
    from ouro_megatron.training.trainer import StepOutcome, Trainer

    def check(self: Stopping, trainer: Trainer, outcome: StepOutcome) -> None:
        trainer.stop_requested = trainer.progress.step >= step

    Stopping.after_step = check  # type: ignore[method-assign]
    return stage(recipe)


def test_two_stages_that_carry_everything_are_one_long_stage(tmp_path: Path) -> None:
    whole = train(tmp_path, "1x1", name="whole", **CONSTANT)
    train(tmp_path, "1x1", name="first", budget={"total": "8 steps"}, **CONSTANT)
    init = {"stage": "first", "optimizer": True, "data_position": True}
    second = train(tmp_path, "dp4", name="second", budget={"total": "12 steps"}, init=init, **CONSTANT)
    assert losses(second) == pytest.approx(losses(whole)[8:], abs=1e-5)
    said = events(second, "handover")
    assert any("step 8 of first" in line for line in said)
    assert any("moments carried, 8 updates" in line for line in said)
    assert any("goes on at sample 64" in line for line in said)
    state = read_state(resolve(second.run_folder).folder)
    assert (state.first_sample, state.samples, state.optimizer_steps) == (64, 96, 20)
    assert [record.name for record in state.history] == ["first"]
    assert state.history[0].facts["loops"] == [3]
    assert tokens_in_all(state) == 20 * 256
    again = {**init, "stage": "second"}
    third = train(tmp_path, "1x1", name="third", budget={"total": "2 steps"}, init=again, **CONSTANT)
    assert [record.name for record in read_state(resolve(third.run_folder).folder).history] == ["first", "second"]
    assert any("goes on at sample 160" in line for line in events(third, "handover"))


def test_what_begins_afresh_is_said(tmp_path: Path) -> None:
    train(tmp_path, "1x1", name="first", budget={"total": "2 steps"}, **CONSTANT)
    second = train(
        tmp_path,
        "1x1",
        name="second",
        budget={"total": "2 steps"},
        init={"stage": "first"},
        model={"loops": 2, "rope_base": 40000},
        data={"sequence_length": 64},
        objective={"beta": 0.05},
        **CONSTANT,
    )
    said = events(second, "handover")
    for line in (
        "optimizer: afresh (init.optimizer=false)",
        "model.loops: 3 -> 2",
        "model.rope_base: 10000.0 -> 40000.0",
        "data.sequence_length: 32 -> 64",
        "objective.beta: 0.1 -> 0.05",
    ):
        assert line in said
    assert any(line.startswith("data position: first sample") for line in said)


def test_an_unfinished_stage_and_another_blend_are_refused(tmp_path: Path) -> None:
    half = tiny_recipe(tmp_path, name="half", checkpoint={"every": "2 steps"})
    run_ranks(stage_until, 1, half, 2)
    with pytest.raises(RankFailure, match=r"init\.stage=half is not finished: .* is step 2 of 20"):
        train(tmp_path, "1x1", name="next", init={"stage": "half"})
    with pytest.raises(RankFailure, match=r"data\.sequence_length: was 32, is 64"):
        init = {"checkpoint": str(tmp_path / "runs" / "half"), "data_position": True}
        train(tmp_path, "1x1", name="next", init=init, data={"sequence_length": 64})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"init": {"stage": "a", "checkpoint": "b"}}, "both name where to start from"),
        ({"init": {"stage": "tiny"}}, "is this stage itself"),
        ({"init": {"data_position": True}}, "init.data_position=true carries the data position"),
        ({"training": {"early_loops": [{"loops": 8, "until": "20 steps"}]}}, "set model.loops=8 instead"),
        (
            {"training": {"early_loops": [{"loops": 8, "until": "5 steps"}, {"loops": 6, "until": "5 steps"}]}},
            "early_loops.1.until=5 steps does not come after",
        ),
    ],
)
def test_refused_before_anything_starts(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_recipe(tiny_recipe(tmp_path, **sections))
    assert issubclass(RecipeError, OuroError)
