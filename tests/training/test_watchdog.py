"""Ranks that freeze, hang, die or drag: real processes and signals, and the one message that comes of it."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ouro_megatron.errors import TrainingError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metric_names import metrics_of
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EventRecord, StepRecord
from tests.distributed.ranks import free_port
from tests.tiny import tiny_recipe
from tests.training.stalls import BEATS_SECONDS, SLOW_SECONDS, StallingRanks
from tests.training.test_launch import two_tasks, wait_for_steps

pytestmark = pytest.mark.distributed
TIMEOUT = 8.0
TEARDOWN = 6.0
"""After the verdict: the other ranks leave, the launcher ends what is frozen."""


def long_run(folder: Path, name: str, **parallel: Any) -> Recipe:
    return tiny_recipe(
        folder,
        name=name,
        budget={"total": "200 steps"},
        checkpoint={"every": "1000 steps"},
        parallel={"timeout_seconds": TIMEOUT, **parallel},
    )


def message_of(recipe: Recipe, folder: Path, what: str, victim: int) -> str:
    """Runs two ranks until the victim stalls; the launcher's message, which must come in time."""
    ranks = StallingRanks(recipe, folder / recipe.name, 2, what, victim)
    with pytest.raises(TrainingError) as caught:
        ranks.run()
    assert ranks.fired.exists(), caught.value
    assert time.time() - ranks.fired.stat().st_mtime < BEATS_SECONDS + TIMEOUT + TEARDOWN
    return str(caught.value)


def test_frozen_in_forward(tmp_path: Path) -> None:
    said = message_of(long_run(tmp_path, "forward", pipeline=2), tmp_path, "freeze in forward", 1)
    assert said.startswith("rank 1 (tensor 0, pipeline 1, data 0) does not answer"), said
    assert "stage forward, step 3, forward and backward, forward of loop 2, microbatch 3" in said
    assert "1 rank waited" in said and f"parallel.timeout_seconds={TIMEOUT:g}" in said
    assert "rank 0 (tensor 0, pipeline 0, data 0) in message from rank 1 in" in said


def test_frozen_in_a_collective_of_the_optimizer(tmp_path: Path) -> None:
    said = message_of(long_run(tmp_path, "optimizer", data=2), tmp_path, "freeze in optimizer", 1)
    assert said.startswith("rank 1 (tensor 0, pipeline 0, data 1) does not answer"), said
    assert "stage optimizer, step 3, optimizer step" in said.partition(". 1 rank waited")[0]
    assert "rank 0 (tensor 0, pipeline 0, data 0) in all_reduce of " in said and "over ranks 0, 1" in said


def test_the_host_of_the_store_frozen_while_it_reads_data(tmp_path: Path) -> None:
    said = message_of(long_run(tmp_path, "host", tensor=2), tmp_path, "freeze in data", 0)
    assert said.startswith("rank 0 (tensor 0, pipeline 0, data 0) does not answer"), said
    assert "stage host, step 3, reading data" in said and "rank 1 (tensor 1, pipeline 0, data 0) waited" in said


def test_alive_but_stuck_in_reading_data(tmp_path: Path) -> None:
    recipe = long_run(tmp_path, "data", data=2)
    said = message_of(recipe, tmp_path, "hang in data", 1)
    assert said.startswith("rank 1 (tensor 0, pipeline 0, data 1) does not go on: for "), said
    assert "stage data, step 3, reading data, at hang (stalls.py:" in said or "step 3, reading data, at" in said
    events = [record for record in read_records(recipe.run_folder / "metrics.jsonl") if isinstance(record, EventRecord)]
    assert events[-1].name == "failure"


@pytest.mark.slow
def test_a_killed_task_of_srun_is_one_message(tmp_path: Path) -> None:
    recipe = long_run(tmp_path, "killed", pipeline=2)
    file = tmp_path / "killed.yaml"
    file.write_text(dump_recipe(recipe))
    with two_tasks(file, str(free_port())) as (first, second):
        wait_for_steps(tmp_path, "killed", first)
        psutil.Process(second.pid).kill()
        said, _ = first.communicate(timeout=60)
    assert first.returncode == 5, said
    assert said.count("error:") == 1 and "failure" not in said and "Exception raised from" not in said, said
    assert "rank 1 (tensor 0, pipeline 1, data 0) is gone: killed, or its node failed" in said
    assert "last seen in stage killed, step" in said


@pytest.mark.slow
def test_the_killed_host_of_the_store_is_one_message(tmp_path: Path) -> None:
    recipe = long_run(tmp_path, "killed-host", data=2)
    file = tmp_path / "killed-host.yaml"
    file.write_text(dump_recipe(recipe))
    with two_tasks(file, str(free_port())) as (first, second):
        wait_for_steps(tmp_path, "killed-host", first)
        psutil.Process(first.pid).kill()
        said, _ = second.communicate(timeout=60)
    assert second.returncode == 5, said
    assert said.count("error:") == 1 and "Exception raised from" not in said, said
    assert "rank 0 (tensor 0, pipeline 0, data 0) is gone" in said and "stage killed-host, step" in said


def test_a_slow_rank_shows_in_the_metrics_and_in_a_warning(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        name="slow",
        model={"layers": 1, "loops": 2},
        budget={"total": "12 steps"},
        batch={"global_tokens": 64},
        parallel={"data": 2},
    )
    assert StallingRanks(recipe, tmp_path / "slow", 2, "slow", 1).run() == 0
    records = read_records(recipe.run_folder / "metrics.jsonl")
    steps = [record for record in records if isinstance(record, StepRecord)]
    for step in steps[1:]:
        assert step.ranks is not None
        assert step.ranks.slowest_rank == step.ranks.straggler_rank == 1
        assert step.ranks.slowest_seconds > 2 * SLOW_SECONDS > step.ranks.straggler_excess / 10
        assert step.ranks.slowest_seconds >= step.ranks.fastest_seconds > 0
    assert metrics_of(steps[-1])["perf/slowest_rank"] == 1
    assert metrics_of(steps[-1])["perf/rank_seconds_max"] == steps[-1].ranks.slowest_seconds  # type: ignore[union-attr]
    warnings = [r.message for r in records if isinstance(r, EventRecord) and r.name == "warning"]
    assert any("rank 1 was the slowest of its equals in 10 steps on end" in message for message in warnings), warnings


def test_a_step_as_it_went_is_drawn(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        name="drawn",
        budget={"total": "5 steps"},
        parallel={"pipeline": 2},
        logging={"timeline_step": 2, "wandb": {"mode": "disabled"}},
    )
    assert StallingRanks(recipe, tmp_path / "drawn", 2, "", 0).run() == 0
    assert (recipe.run_folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((recipe.run_folder / "timeline.json").read_text())["traceEvents"]
    tasks = [event for event in events if event["ph"] == "X"]
    microbatches = 256 // 32
    assert len(tasks) == len({(task["tid"], task["name"]) for task in tasks}) == 2 * 2 * 3 * microbatches
    ends = {(task["tid"], task["name"]): task["ts"] + task["dur"] for task in tasks}
    for task in tasks:  # a forward on rank 1 follows the same one on rank 0; clocks agree within a few milliseconds
        if task["cat"] == "forward" and task["tid"] == 1:
            assert task["ts"] + task["dur"] > ends[0, task["name"]] - 20_000
