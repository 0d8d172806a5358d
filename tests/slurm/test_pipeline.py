"""Pipelines on a real Slurm: chains, preemption, dead nodes, failures, cancelling. Losses are an undisturbed run's."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ouro_megatron.checkpoint.folder import step_folders
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EventRecord, StepRecord
from tests.distributed.ranks import run_ranks
from tests.slurm.cluster import SlurmCluster, wait_until
from tests.tiny import tiny_recipe
from tests.training.test_resume import losses, stage

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
OURO = Path(sys.executable).with_name("ouro")
STEPS = 30
STAGE: dict[str, Any] = {
    "budget": {"total": f"{STEPS} steps"},
    "checkpoint": {"every": "5 steps"},
    "parallel": {"tensor": 2, "data": 2, "timeout_seconds": 120},
}
SMALL: dict[str, Any] = {"budget": {"total": "3 steps"}, "schedule": {"warmup": 0}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the four-rank stage when nothing happens to it."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("undisturbed"), name="first", **STAGE)
    run_ranks(stage, 4, recipe)
    return losses(recipe)


@pytest.fixture
def idle(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster; afterwards no job is left of a test that failed half-way."""
    yield slurm
    slurm.run("scancel", "--user", psutil.Process().username(), check=False)
    wait_until(lambda: slurm.idle_nodes() == slurm.nodes, 120, "nodes are idle again")


class Project:
    """A folder with data, recipes and a pipeline file, and the commands run in it."""

    def __init__(self, folder: Path, slurm: SlurmCluster) -> None:
        self.folder = folder
        self.slurm = slurm
        self.steps: list[dict[str, Any]] = []
        cluster = {
            "gpus_per_node": 2,
            "exclusive": False,
            "partition": "main",
            "grace_seconds": 60,
            "command": shlex.quote(str(OURO)),
            "environment": {"OMP_NUM_THREADS": "1"},
        }
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))

    def add(self, name: str, *, nodes: int = 1, time: str = "24:00:00", **sections: Any) -> None:
        recipe = tiny_recipe(self.folder, name=name, **sections)
        (self.folder / f"{name}.yaml").write_text(dump_recipe(recipe))
        self.add_step(recipe=f"{name}.yaml", nodes=nodes, time=time)

    def add_step(self, **step: Any) -> None:
        self.steps.append({"time": "0:30:00", **step})
        values = {"name": "test", "run_dir": str(self.runs), "cluster": "cluster.yaml", "steps": self.steps}
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump(values))

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def ouro(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(OURO), *words],
            cwd=self.folder,
            env=self.slurm.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> None:
        self.ouro("submit", "pipeline.yaml", *words)

    def job(self, name: str) -> int:
        return int(json.loads((self.runs / name / "slurm" / "job.json").read_text())["job"])

    def log(self, name: str) -> str:
        return "".join(log.read_text() for log in (self.runs / name / "slurm").glob("job-*.log"))

    def done(self, name: str) -> list[StepRecord]:
        path = self.runs / name / "metrics.jsonl"
        return [r for r in read_records(path) if isinstance(r, StepRecord)] if path.exists() else []

    def wait_for_steps(self, name: str, steps: int) -> None:
        wait_until(lambda: len(self.done(name)) >= steps, 180, f"{name} has done {steps} steps", pause=0.02)

    def ranks(self, name: str) -> list[psutil.Process]:
        """The training processes of a step's job."""
        wanted, found = str(self.job(name)), []
        for process in psutil.process_iter():
            try:
                is_rank = "train" in process.cmdline() and process.name().startswith(("ouro", "python"))
                if is_rank and process.environ().get("SLURM_JOB_ID") == wanted:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def project(tmp_path: Path, idle: SlurmCluster) -> Project:
    folder = tmp_path / "a project"
    folder.mkdir()
    return Project(folder, idle)


def test_a_chain_is_preempted_branches_and_stops_after_a_failure(project: Project, undisturbed: list[float]) -> None:
    slurm = project.slurm
    project.add("first", nodes=2, **STAGE)
    project.add_step(name="deep", upcycle={"source": "first", "layers": 8, "map": "stack", "sequences": 2})
    project.add("second", init={"stage": "deep", "optimizer": True}, model={"layers": 8}, parallel={"data": 2}, **SMALL)
    project.add(
        "broken",
        init={"stage": "first"},
        data={"train": [{"path": str(project.folder / "gone"), "weight": 1}]},
        **SMALL,
    )
    project.add("never", init={"stage": "broken"}, **SMALL)
    for suffix in (".bin", ".idx"):
        (project.folder / f"gone{suffix}").write_bytes((project.folder / f"train{suffix}").read_bytes())
    project.submit()
    (project.folder / "gone.bin").unlink()
    project.wait_for_steps("first", 12)
    ranks = project.ranks("first")
    assert len(ranks) == 4
    for rank in ranks:
        rank.suspend()  # so that it does not finish first; Slurm's own CONT or ours below wakes it
    script = project.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 1\n")
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", f"--output={script}.log", str(script))
    time.sleep(3.0)
    for rank in ranks:
        if rank.is_running():
            rank.resume()
    assert slurm.wait(urgent, timeout=180) == {str(urgent): "COMPLETED"}
    waiting = project.ouro("status", "pipeline.yaml")
    assert "Dependency" in waiting and "not submitted" not in waiting
    ended = slurm.wait(*(project.job(name) for name in ("first", "deep", "second", "broken", "never")), timeout=400)
    by_name = {name: ended[str(project.job(name))] for name in ("first", "deep", "second", "broken", "never")}
    assert by_name == {
        "first": "COMPLETED",
        "deep": "COMPLETED",
        "second": "COMPLETED",
        "broken": "FAILED",
        "never": "CANCELLED",
    }, project.log("first") + project.log("second") + project.log("broken")
    assert [record.loss for record in project.done("first")] == undisturbed
    assert int(slurm.show(project.job("first"))["Restarts"]) == 1
    assert "gone.bin" in project.log("broken")
    state = read_state(step_folders(project.runs / "second" / "checkpoints")[-1])
    assert [record.name for record in state.history] == ["first", "stack to 8 layers"]
    table = project.ouro("status", "pipeline.yaml")
    assert "exit code 3" in table and "before it started" in table
    assert table.count("finished") == 3
    again = project.ouro("submit", "pipeline.yaml", "--dry-run", code=8)
    assert "gone.bin" in again


def mid_save(project: Project, name: str) -> bool:
    """Whether a save is going on right now: a checkpoint folder without its marker."""
    return any(not (folder / "complete.json").exists() for folder in step_folders(project.runs / name / "checkpoints"))


def test_a_node_that_dies_during_a_save_costs_only_the_steps_since_the_one_before(
    project: Project, undisturbed: list[float]
) -> None:
    slurm = project.slurm
    project.add("first", nodes=2, **STAGE)
    project.submit()
    project.wait_for_steps("first", 7)
    wait_until(lambda: mid_save(project, "first"), 60, "a save is going on", pause=0.0)
    slurm.kill_node("node2")
    slurm.revive_node("node2")
    job = project.job("first")
    assert slurm.wait(job, timeout=400) == {str(job): "COMPLETED"}, project.log("first")
    assert [record.loss for record in project.done("first")] == undisturbed
    records = read_records(project.runs / "first" / "metrics.jsonl")
    assert any(isinstance(record, EventRecord) and record.name == "resume" for record in records)


def test_a_stage_longer_than_the_time_limit_requeues_itself_until_it_is_done(
    project: Project, undisturbed: list[float]
) -> None:
    """Nobody but Slurm signals here: it warns the ranks a minute before a limit of two."""
    slurm = project.slurm
    project.add("first", nodes=2, time="0:02:00", **STAGE)
    project.add("second", init={"stage": "first"}, parallel={"data": 2}, **SMALL)
    project.submit()
    first, second = project.job("first"), project.job("second")
    project.wait_for_steps("first", 8)
    for rank in project.ranks("first"):
        rank.suspend()  # so that it does not finish before the limit; Slurm wakes what it warns
    wait_until(lambda: slurm.state(first) == "PENDING", 120, "Slurm's warning has come, the job is requeued")
    assert "saved and stopped; requeueing" in project.log("first")
    assert slurm.show(second)["Reason"] == "Dependency", "what waits for it goes on waiting"
    assert slurm.wait(first, second, timeout=200) == {str(first): "COMPLETED", str(second): "COMPLETED"}
    assert int(slurm.show(first)["Restarts"]) >= 1
    assert [record.loss for record in project.done("first")] == undisturbed


def test_a_warning_requeues_a_rank_that_dies_is_tried_again_and_cancel_saves(project: Project) -> None:
    slurm = project.slurm
    project.add("endless", budget={"total": "100000 steps"}, checkpoint={"every": "1000 steps"}, parallel={"data": 2})
    project.submit()
    job = project.job("endless")
    project.wait_for_steps("endless", 3)
    slurm.run("scancel", "--signal=USR1", str(job))  # what --signal sends before the time limit
    wait_until(lambda: slurm.state(job) == "PENDING", 60, "the job is requeued")
    saved = step_folders(project.runs / "endless" / "checkpoints")
    assert len(saved) == 1 and (saved[0] / "complete.json").exists()
    restart(project, "endless")
    os.kill(project.ranks("endless")[0].pid, signal.SIGKILL)
    wait_until(lambda: slurm.state(job) == "PENDING", 120, "the job is requeued after a failure")
    assert "failure 1 without a new checkpoint" in project.log("endless")
    restart(project, "endless")
    assert "running" in project.ouro("status", "pipeline.yaml")
    refused = project.ouro("submit", "pipeline.yaml")
    assert f"endless: job {job} already" in refused
    project.ouro("cancel", "pipeline.yaml")
    assert slurm.wait(job) == {str(job): "CANCELLED"}
    assert int(slurm.show(job)["Restarts"]) == 2
    last = step_folders(project.runs / "endless" / "checkpoints")[-1]
    assert last.name > saved[0].name and (last / "complete.json").exists(), "a cancelled stage saves first"
    assert "cancelled" in project.ouro("status", "pipeline.yaml")


def restart(project: Project, name: str) -> None:
    """Ends Slurm's delay after a requeue and waits until the job trains again."""
    time.sleep(2.5)
    job, before = project.job(name), len(project.ranks(name))
    assert before == 0
    project.slurm.start_now(job)
    wait_until(lambda: project.slurm.state(job) == "RUNNING", 60, "the job runs again")
    resumed = len(project.done(name))
    project.wait_for_steps(name, resumed + 3)


def test_what_cannot_run_is_refused_with_all_reasons_before_sbatch(project: Project) -> None:
    project.add("wide", parallel={"tensor": 4}, **SMALL)
    project.add("dataless", data={"train": [{"path": str(project.folder / "nowhere"), "weight": 1}]}, **SMALL)
    project.add("orphan", init={"checkpoint": str(project.folder / "no-checkpoint")}, **SMALL)
    said = project.ouro("submit", "pipeline.yaml", "cluster.partition=nowhere", code=8)
    for reason in (
        "wide: 1 nodes x 2 ranks = 2, but parallel.tensor=4 x parallel.pipeline=1 x parallel.context=1 needs 4; 2 ",
        f"dataless: data: these .bin/.idx pairs are missing (1): {project.folder}/nowhere; prepare them",
        "no-checkpoint, which does not exist",
        "sbatch would refuse wide, dataless, orphan (1 node, 2 GPUs and 2 cores each, partition nowhere, time ",
        "invalid partition",
    ):
        assert reason in said, said
    assert not project.runs.exists(), "nothing may be left behind"
    assert project.slurm.run("squeue", "-h").stdout == ""
    project.add("fine", **SMALL)
    only = ("--from", "fine", "--to", "fine")
    long = project.ouro("submit", "pipeline.yaml", *only, "cluster.partition=short", "--time", "0:30:00", code=8)
    assert "fine asks for 0:30:00, its partition's time limit is 10m 00s: it would wait for ever" in long, long
    brief = project.ouro("submit", "pipeline.yaml", *only, "--time", "1", code=8)
    assert "fine: its time limit 1 is not longer than cluster.grace_seconds=60" in brief
    good = project.ouro("submit", "pipeline.yaml", *only, "cluster.partition=short", "--time", "0:10:00", "--dry-run")
    assert "# good: 1 step to submit" in good
    assert "no step 'orfan'; did you mean 'orphan'?" in project.ouro(
        "submit", "pipeline.yaml", "--from", "orfan", code=8
    )
