"""Saving beside training, stops during evaluations and saves, rollbacks: in whole runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ouro_megatron.checkpoint.writer as writer
from ouro_megatron.checkpoint.folder import read_marker, resolve, step_folders
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, Record, StepRecord
from ouro_megatron.training import callbacks
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.stage import run_stage
from tests.distributed.ranks import RankFailure, run_ranks
from tests.faults.inject import spoil_data
from tests.tiny import tiny_recipe
from tests.training.test_resume import losses, stage

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    tiny_recipe(folder)
    return folder


def short(folder: Path, name: str, **sections: Any) -> Recipe:
    defaults: dict[str, Any] = {
        "model": {"layers": 2, "loops": 2},
        "budget": {"total": "12 steps"},
        "checkpoint": {"every": "3 steps"},
        "parallel": {"data": 2, "timeout_seconds": 60},
    }
    return tiny_recipe(folder, name=name, **{**defaults, **sections})


def records(recipe: Recipe) -> list[Record]:
    return read_records(recipe.run_folder / "metrics.jsonl")


def messages(recipe: Recipe, name: str) -> list[str]:
    return [r.message for r in records(recipe) if isinstance(r, EventRecord) and r.name == name]


def test_saving_beside_training_gives_the_same_checkpoints(data: Path) -> None:
    beside = {"every": "3 steps", "asynchronous": True, "keep_last": 4}
    recipes = [
        short(data, "wait", checkpoint={**beside, "asynchronous": False}),
        short(data, "beside", checkpoint=beside),
    ]
    for recipe in recipes:
        run_ranks(stage, 2, recipe)
    assert losses(recipes[0]) == losses(recipes[1])
    folders = [step_folders(recipe.run_folder / "checkpoints") for recipe in recipes]
    assert [folder.name for folder in folders[0]] == [folder.name for folder in folders[1]]
    for one, other in zip(*folders, strict=True):
        assert _tensors(one) == _tensors(other)
    assert any("beside training" in message for message in messages(recipes[1], "checkpoint"))


def _tensors(folder: Path) -> dict[str, str]:
    return {name: value for name, value in read_marker(folder)["hashes"].items() if name.endswith(".distcp")}


def broken_writer(recipe: Recipe) -> None:
    """Rank 1 cannot write its file of step 6."""
    hash_of = writer.hash_of

    def fail(path: Path) -> str:
        if path.name.startswith("__1_") and "step-00000006" in str(path):
            raise OSError("Input/output error")
        return hash_of(path)

    writer.hash_of = fail
    stage(recipe)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_cannot_be_written_is_named(data: Path, asynchronous: bool) -> None:
    checkpoint = {"every": "3 steps", "asynchronous": asynchronous}
    # Tensor-parallel ranks both have files to write.
    recipe = short(data, f"broken-{asynchronous}", checkpoint=checkpoint, parallel={"tensor": 2, "timeout_seconds": 60})
    with pytest.raises(RankFailure, match=r"could not save .*step-00000006.*__1_\d\.distcp: Input/output error"):
        run_ranks(broken_writer, 2, recipe)
    assert resolve(recipe.run_folder).folder.name == "step-00000003"
    done = [record.step for record in records(recipe) if isinstance(record, StepRecord)]
    assert done[-1] <= (9 if asynchronous else 6)  # at the next step, at the latest when the next save is due


def stopped_in_evaluation(recipe: Recipe, after: int) -> bool:
    """A signal comes during batch `after` of the last evaluation, on one rank."""
    signals, evaluate = StopSignals(), callbacks.read

    def observed(reader: Any, first: int, samples: int) -> Any:
        if first == after * samples:
            import os

            if os.environ["RANK"] == "1":
                signals.received = "SIGTERM"
        return evaluate(reader, first, samples)

    callbacks.read = observed
    return run_stage(recipe, signals)


def test_a_stop_during_an_evaluation_saves_at_once_and_the_evaluation_is_made_up_for(data: Path) -> None:
    recipe = short(data, "evaluation", budget={"total": "4 steps"}, evaluation={"batches": 6})
    assert run_ranks(stopped_in_evaluation, 2, recipe, 2) == [False, False]
    assert not any(isinstance(record, EvalRecord) for record in records(recipe))
    state = read_state(resolve(recipe.run_folder).folder)
    assert state.step == 4 and state.pending_evaluation
    assert run_ranks(finished, 2, recipe) == [True, True]
    assert [record.step for record in records(recipe) if isinstance(record, EvalRecord)] == [4]
    assert not read_state(resolve(recipe.run_folder).folder).pending_evaluation


def finished(recipe: Recipe) -> bool:
    return run_stage(recipe, StopSignals())


HEALTH = {"skip_spikes": True, "window": 16, "min_steps": 4, "rollback_after": 2}


def spiky(recipe: Recipe, bad_sample: int) -> bool:
    spoil_data("spike", bad_sample)
    return run_stage(recipe, StopSignals())


def test_a_rollback_leaves_the_data_out_and_later_stages_know(data: Path) -> None:
    # 8 samples a step; samples 56 to 63 are step 8's and those up to 71 step 9's.
    recipe = short(data, "spike", health=HEALTH, batch={"global_tokens": 256})
    assert run_ranks(spiky, 2, recipe, 60) == [True, True]
    (message,) = messages(recipe, "rollback")
    assert "up to step 9 were skipped: back at step 6; samples 48 to 72 are left out" in message
    state = read_state(resolve(recipe.run_folder).folder)
    (entry,) = state.health["rollbacks"]
    assert (entry["from_step"], entry["to_step"], entry["start"], entry["end"]) == (9, 6, 48, 72)
    assert json.loads((recipe.run_folder / "rollbacks.json").read_text()) == [entry]
    assert state.step == 12 and state.skipped_steps == 0  # those two steps are not part of the run any more
    # A fresh run that never sees those samples, from the same checkpoint, is the same run.
    shutil.copytree(recipe.run_folder, data / "runs" / "spike-again")
    again = short(data, "spike-again", health=HEALTH, batch={"global_tokens": 256})
    for step in (9, 12):
        shutil.rmtree(again.run_folder / "checkpoints" / f"step-{step:08d}")
    assert run_ranks(finished, 2, again) == [True, True]
    assert losses(again)[-6:] == losses(recipe)[-6:]
    child = short(data, "child", init={"checkpoint": str(recipe.run_folder)}, budget={"total": "4 steps"})
    run_ranks(stage, 2, child)
    (record,) = read_state(resolve(child.run_folder).folder).history
    assert "1 rollbacks" in record.detail


def test_a_spike_before_the_first_checkpoint_has_nothing_to_go_back_to(data: Path) -> None:
    recipe = short(data, "early", health=HEALTH, checkpoint={"every": "100 steps"})
    with pytest.raises(RankFailure, match="there is no checkpoint of step"):
        run_ranks(spiky, 2, recipe, 60)


def all_bad(recipe: Recipe) -> bool:
    """From sample 48 on every sample is bad."""
    from ouro_megatron.training.engine import Engine

    accumulate = Engine.accumulate

    def poisoned(self: Engine, batches: list[Any]) -> Any:
        means = accumulate(self, batches)
        if self.position.step > 6:
            means = type(means)(float("nan"), *list(vars(means).values())[1:])
        return means

    Engine.accumulate = poisoned  # type: ignore[method-assign]
    return run_stage(recipe, StopSignals())


def test_rollbacks_come_to_an_end(data: Path) -> None:
    recipe = short(data, "hopeless", health={**HEALTH, "max_rollbacks": 2})
    with pytest.raises(RankFailure, match=r"after 2 rollbacks \(health.max_rollbacks=2\): going back does not help"):
        run_ranks(all_bad, 2, recipe)
    assert len(json.loads((recipe.run_folder / "rollbacks.json").read_text())) == 2
