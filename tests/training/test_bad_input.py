"""What goes wrong in a run: one clear error, and nothing half-written is taken for whole."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from ouro_megatron.checkpoint.folder import mark_complete, resolve, step_folders
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EventRecord, StepRecord
from ouro_megatron.training import stage as stage_module
from ouro_megatron.training.engine import Engine
from tests.distributed.ranks import RankFailure, run_ranks
from tests.tiny import tiny_recipe
from tests.training.test_resume import stage, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run `base` with checkpoints at steps 4 and 8 of 12."""
    folder = tmp_path_factory.mktemp("bad input")
    train(folder, "1x1", name="base", checkpoint={"every": "4 steps"}, budget={"total": "8 steps"})
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def fails(folder: Path, *words: str, ranks: int = 1, **sections: Any) -> None:
    sections.setdefault("name", "new")
    with pytest.raises(RankFailure) as caught:
        run_ranks(stage, ranks, tiny_recipe(folder, **sections))
    for word in words:
        assert word in str(caught.value)


def test_missing_data(folder: Path) -> None:
    (folder / "train.bin").unlink()
    fails(folder, "DataError", "train.bin")


def test_truncated_data_on_several_ranks(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-100])
    fails(folder, "DataError", "train.bin: too short", ranks=2, parallel={"data": 2})


def test_vocabulary_too_small(folder: Path) -> None:
    fails(folder, "DataError", "model.vocab", model={"vocab": 64})


def test_data_changed_since_the_checkpoint(folder: Path) -> None:
    from tests.tiny import write_corpus

    write_corpus(folder / "train", documents=70, seed=9)
    fails(folder, "DataError", "is not what this run was trained on", "document count", name="base")


def test_checkpoint_of_another_model(folder: Path) -> None:
    init = {"checkpoint": str(folder / "runs" / "base")}
    fails(folder, "CheckpointError", "model.hidden", "32", "64", model={"hidden": 64}, init=init)


def test_init_checkpoint_missing(folder: Path) -> None:
    fails(folder, "CheckpointError", "init.checkpoint", "nowhere", init={"checkpoint": str(folder / "nowhere")})


@pytest.mark.parametrize("ranks", [1, 2])
def test_batch_changed_in_the_middle(folder: Path, ranks: int) -> None:
    sections: dict[str, Any] = {"name": "base", "batch": {"global_tokens": 512}, "parallel": {"data": ranks}}
    fails(folder, "RecipeError", "samples", ranks=ranks, **sections)


def test_loops_changed_at_resume(folder: Path) -> None:
    fails(folder, "RecipeError", "model.loops=2", "model.loops=3", "init.checkpoint=", name="base", model={"loops": 2})
    early = {"early_loops": [{"loops": 1, "until": "10 steps"}], "device": "cpu"}
    fails(folder, "RecipeError", "1 of them from step 8", "training.early_loops", name="base", training=early)


def resume(folder: Path) -> list[EventRecord]:
    recipe = train(folder, "1x1", name="base", checkpoint={"every": "4 steps"}, budget={"total": "12 steps"})
    records = read_records(recipe.run_folder / "metrics.jsonl")
    assert [record.step for record in records if isinstance(record, StepRecord)] == list(range(1, 13))
    return [record for record in records if isinstance(record, EventRecord)]


@pytest.mark.parametrize("damage", ["truncated", "no marker", "half-written state"])
def test_falls_back_to_the_newest_good_checkpoint_and_says_so(folder: Path, damage: str) -> None:
    newest = resolve(folder / "runs" / "base").folder
    if damage == "truncated":
        shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "no marker":
        (newest / "complete.json").unlink()
    else:
        (newest / "state.json").write_text("{")
    events = resume(folder)
    assert any(event.name == "resume" and "step-00000004" in event.message for event in events)
    assert any(event.name == "warning" and "step-00000008" in event.message for event in events)


def test_damage_that_sizes_do_not_show_is_an_error(folder: Path) -> None:
    newest = resolve(folder / "runs" / "base").folder
    (newest / ".metadata").write_bytes(b"not a pickle")
    mark_complete(newest)
    fails(folder, "CheckpointError", "step-00000008", name="base")


def poisoned_stage(recipe: Recipe, steps: list[int], what: str) -> None:
    """Runs a stage whose loss or gradient is not finite at the given steps."""
    accumulate = Engine.accumulate

    def poison(self: Engine, batches: list) -> Any:
        means = accumulate(self, batches)
        if self.position.step in steps:
            if what == "gradient":
                next(self.lm.parameters()).main_grad.fill_(math.inf)
            else:
                means = type(means)(math.nan, *list(vars(means).values())[1:])
        return means

    Engine.accumulate = poison  # type: ignore[method-assign]
    stage(recipe)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_is_skipped_and_counted(folder: Path, what: str) -> None:
    recipe = tiny_recipe(folder, name=what, budget={"total": "6 steps"})
    run_ranks(poisoned_stage, 1, recipe, [3, 4], what)
    steps = [r for r in read_records(recipe.run_folder / "metrics.jsonl") if isinstance(r, StepRecord)]
    assert [record.skipped for record in steps] == [False, False, True, True, False, False]
    assert steps[-1].skipped_steps == 2
    assert math.isfinite(steps[-1].loss) and steps[-1].loss < steps[0].loss


@pytest.mark.distributed
def test_too_many_in_a_row_stop_the_run(folder: Path) -> None:
    recipe = tiny_recipe(
        folder, name="nan", training={"max_skipped_steps": 3, "device": "cpu"}, parallel={"pipeline": 2}
    )
    with pytest.raises(RankFailure, match=r"3 steps in a row up to step 7"):
        run_ranks(poisoned_stage, 2, recipe, list(range(5, 20)), "loss")
    assert step_folders(recipe.run_folder / "checkpoints") == []


def full_disk_stage(recipe: Recipe, room: int) -> None:
    """Runs a stage in which no file may grow beyond `room` bytes: what a full disk or quota does to a large shard."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = stage_module.Checkpoints._save

    def limited(self: Any, trainer: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        save(self, trainer)

    stage_module.Checkpoints._save = limited  # type: ignore[method-assign]
    stage(recipe)


@pytest.mark.distributed
def test_full_disk_during_a_save(folder: Path) -> None:
    sections: dict[str, Any] = {"name": "base", "parallel": {"tensor": 2, "timeout_seconds": 20}}
    recipe = tiny_recipe(folder, **sections, checkpoint={"every": "4 steps"}, budget={"total": "12 steps"})
    with pytest.raises(RankFailure, match=r"CheckpointError: rank \d .*could not save .*step-00000012.*full disk"):
        run_ranks(full_disk_stage, 2, recipe, 20_000)
    assert resolve(recipe.run_folder).folder.name == "step-00000008"
    events = resume(folder)
    assert any(event.name == "warning" and "removed" in event.message for event in events)


def test_second_job_in_the_same_folder(folder: Path) -> None:
    import fcntl

    recipe = tiny_recipe(folder, name="base")
    with (recipe.run_folder / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(folder, "TrainingError", "in use by another job", name="base")
