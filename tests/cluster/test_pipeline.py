"""Pipeline files to jobs and scripts: order, branches, errors, and what the batch script does with each exit code."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ouro_megatron.cluster.checks import time_problems
from ouro_megatron.cluster.pipeline import Pipeline, load_pipeline
from ouro_megatron.cluster.script import render
from ouro_megatron.cluster.settings import Divide, Twin, seconds_of
from ouro_megatron.cluster.twin import twin_of
from ouro_megatron.data.complete import complete
from ouro_megatron.data.indexed import check_prefix
from ouro_megatron.errors import ClusterError, DataError, OuroError, RecipeError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.validate import check_recipe
from tests.slurm.cluster import wait_until
from tests.tiny import tiny_recipe


def pipeline_file(folder: Path, steps: list[dict[str, Any]], **values: Any) -> Path:
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"name": "test", "run_dir": str(folder / "runs"), "steps": steps, **values}))
    return file


def recipe_file(folder: Path, name: str, **sections: Any) -> str:
    (folder / f"{name}.yaml").write_text(dump_recipe(tiny_recipe(folder, name=name, **sections)))
    return f"{name}.yaml"


def names(pipeline: Pipeline) -> list[str]:
    return [job.name for job in pipeline.jobs]


def test_steps_come_after_what_they_start_from(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"recipe": recipe_file(tmp_path, "c", init={"stage": "deep"})},
        {"name": "deep", "upcycle": {"source": "a", "layers": 8}},
        {"recipe": recipe_file(tmp_path, "b", init={"stage": "a"}), "after": ["mean"]},
        {"name": "mean", "average": {"source": "a", "last": 2}},
        {"recipe": recipe_file(tmp_path, "a"), "nodes": 3},
    ]
    pipeline = load_pipeline(pipeline_file(tmp_path, steps), ["optimizer.lr=0.5", "cluster.partition=p"])
    assert names(pipeline) == ["a", "deep", "c", "mean", "b"]
    assert pipeline.job("b").needs == ("a", "mean")
    assert pipeline.cluster.partition == "p"
    first = pipeline.job("a").recipe
    assert first is not None and first.optimizer.lr == 0.5
    assert pipeline.job("c").source == tmp_path / "runs" / "deep"
    assert names(load_pipeline(tmp_path)) == names(pipeline), "a folder stands for its pipeline.yaml"
    alone = load_pipeline(tmp_path / "a.yaml", nodes=2, time="10")
    assert [(job.name, job.nodes, job.time, job.needs) for job in alone.jobs] == [("a", 2, "10", ())]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"name": "x"}], "exactly one of recipe, upcycle and average"),
        ([{"recipe": "nowhere.yaml"}], "nowhere.yaml: cannot be read"),
        ([{"upcycle": {"source": "a", "layers": 8}}], "needs a name"),
        ([{"name": "x", "upcycle": {"source": "y", "layers": 8}, "after": ["z"]}], "there is no step 'z'"),
        ([{"name": "x", "upcicle": {}}], "unknown key steps.0.upcicle; did you mean 'upcycle'"),
        ([{"name": "x", "average": {"source": "x", "last": 2}}], "in a circle"),
        ([{"name": "x", "average": {"source": "y", "last": 2}, "time": "soon"}], "steps.0.time"),
        (
            [
                {"name": "x", "average": {"source": "y", "last": 2}},
                {"name": "x", "average": {"source": "y", "last": 3}},
            ],
            "two steps are called x",
        ),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OuroError, match=message):
        load_pipeline(pipeline_file(tmp_path, steps))


def test_a_twin_keeps_proportions(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        model={"layers": 4},
        data={"sequence_length": 32},
        batch={"global_tokens": 4096, "ramp": [{"after": "1M", "global_tokens": 8192}]},
        budget={"total": "3M"},
        schedule={"warmup": "3 steps"},
        training={"early_loops": [{"loops": 5, "until": "1M"}]},
    )
    divide = Divide(layers=2, sequence_length=4, batch_tokens=8, tokens=1000)
    small = twin_of(recipe, Twin(run_dir=tmp_path, divide=divide, recipe={"optimizer": {"lr": 0.25}}))
    assert (small.model.layers, small.data.sequence_length, small.optimizer.lr) == (2, 8, 0.25)
    assert [small.batch.global_tokens, small.batch.ramp[0].global_tokens] == [512, 1024]
    assert small.batch.ramp[0].after.tokens == small.training.early_loops[0].until.tokens == 1000
    assert small.budget.total is not None and small.budget.total.tokens == 3000
    assert str(small.schedule.warmup) == "3 steps"


def test_epochs_and_weights_come_from_the_files(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "data": {"train": [{"path": str(tmp_path / "train")}, {"path": str(tmp_path / "held-out")}]},
        "budget": {"total": None, "epochs": 1.5},
        "schedule": {"warmup": 0},
    }
    recipe = tiny_recipe(tmp_path, **values)
    check_recipe(recipe, 1)
    filled = complete(recipe)
    tokens = [check_prefix(tmp_path / name, 128).tokens for name in ("train", "held-out")]
    assert [entry.share for entry in filled.data.train] == tokens
    assert filled.budget.total is not None and filled.budget.total.tokens == round(1.5 * sum(tokens))
    assert BatchPlan(filled).total_tokens >= 1.5 * sum(tokens)
    assert complete(filled) is filled
    (tmp_path / "held-out.bin").unlink()
    with pytest.raises(DataError, match=r"held-out\.bin"):
        complete(recipe)
    values["data"]["train"][0]["weight"] = 1
    with pytest.raises(RecipeError, match="has no weight, others do"):
        check_recipe(tiny_recipe(tmp_path, **values))


class Shell:
    """The rendered script under bash, with stand-ins for Slurm's commands that do as told and say what they were."""

    def __init__(self, folder: Path, *, retries: int = 2) -> None:
        self.folder = folder / "a project"
        self.folder.mkdir()
        recipe = recipe_file(self.folder, "one")
        steps = [{"recipe": recipe}]
        self.pipeline = load_pipeline(pipeline_file(self.folder, steps), [f"cluster.retries={retries}"])
        self.job = self.pipeline.jobs[0]
        self.job.slurm_folder.mkdir(parents=True)
        self.script = self.job.slurm_folder / "job.sbatch"
        self.script.write_text(render(self.job, self.pipeline.cluster, "test", self.folder))
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.calls = folder / "calls"
        self.program("scontrol", f'echo "scontrol $*" >>{self.calls}; [ "$1" = -o ] && echo NodeAddr=10.0.0.1; echo n1')
        self.program("squeue", "echo RUNNING")

    def program(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.programs / name).chmod(0o755)

    def start(self, code: int | str) -> subprocess.Popen[str]:
        self.calls.write_text("")
        self.program(
            "srun", f'echo "srun $MASTER_ADDR $*" >>"{self.calls}"\nexit {code}' if isinstance(code, int) else code
        )
        environment = {
            **os.environ,
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "12",
            "SLURM_JOB_NODELIST": "n1",
        }
        return subprocess.Popen(
            ["bash", str(self.script)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, code: int) -> tuple[int, bool, str]:
        """Exit code, whether the job was requeued, and what the script said."""
        process = self.start(code)
        said, _ = process.communicate(timeout=60)
        return process.returncode, "requeue 7" in self.calls.read_text(), said


def test_the_script_requeues_what_may_still_succeed(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    marker = shell.job.run_folder / "checkpoints" / "step-00000010" / "complete.json"
    saves = f'mkdir -p "{marker.parent}"; touch "{marker}"; echo "srun $MASTER_ADDR $*" >>"{shell.calls}"; exit 75'
    process = shell.start(saves)
    assert "saved and stopped; requeueing" in process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "requeue 7" in shell.calls.read_text()
    assert (
        f"srun 10.0.0.1 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=12 .venv/bin/ouro train "
        f"{shell.job.slurm_folder}/recipe.yaml" in shell.calls.read_text()
    )
    for code in (2, 3, 4):
        assert shell.run(code)[:2] == (code, False)
    assert shell.run(0)[:2] == (0, False)
    assert (shell.job.slurm_folder / "attempts").read_text().count("start job 7 nodes n1") == 5


def test_the_script_gives_up_after_failures_without_a_new_checkpoint(tmp_path: Path) -> None:
    shell = Shell(tmp_path, retries=2)
    assert [shell.run(5)[1] for _ in range(2)] == [True, True]
    marker = shell.job.run_folder / "checkpoints" / "step-00000010" / "complete.json"
    progress = f'mkdir -p "{marker.parent}"; touch "{marker}"; exit 137'
    process = shell.start(progress)
    said, _ = process.communicate(timeout=60)
    assert "failed with exit code 137 (failure 1 without" in said
    assert [shell.run(5)[1] for _ in range(2)] == [True, False]
    aside = f'mv "{marker.parent}" "{marker.parent}.corrupt"; exit 1'
    said, _ = shell.start(aside).communicate(timeout=60)
    assert "failure 1 without" in said, "back at the start: the newest checkpoint is another one"
    code, requeued, said = shell.run(1)
    assert requeued and "failure 2 without" in said, "a damaged checkpoint that was set aside is none"
    code, requeued, said = shell.run(1)
    assert (code, requeued) == (1, False)
    assert "giving up" in said


def test_the_script_gives_up_on_stops_before_anything_new_was_saved(tmp_path: Path) -> None:
    """As by a time limit that is over before the start is: requeued for ever, it would use up the cluster in vain."""
    shell = Shell(tmp_path, retries=1)
    _, requeued, said = shell.run(75)
    assert requeued and "stopped before it had anything new to save (failure 1 without a new checkpoint)" in said
    code, requeued, said = shell.run(75)
    assert (code, requeued) == (75, False) and "giving up" in said


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:10", 7210), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_times_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_a_time_within_the_grace_is_refused(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, [{"recipe": recipe_file(tmp_path, "one"), "time": "0:05:00"}])
    short = load_pipeline(file)
    assert "one: its time limit 0:05:00 is not longer than cluster.grace_seconds=300" in next(
        time_problems(short.jobs[0], short.cluster)
    )
    longer = load_pipeline(file, time="0:05:01")
    assert not list(time_problems(longer.jobs[0], longer.cluster))
    with pytest.raises(ClusterError, match="time limit 'soon': write hours:minutes:seconds"):
        load_pipeline(file, time="soon")


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.program("squeue", "echo COMPLETING")
    assert shell.run(75)[:2] == (75, False)


def test_a_signal_to_the_script_does_not_end_the_ranks(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    process = shell.start(f"trap '' TERM USR1; echo up >>{shell.calls}; sleep 3; exit 75")
    wait_until(lambda: "up" in shell.calls.read_text(), 30, "the ranks run")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)  # Slurm signals all processes of a batch script
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "requeue 7" in shell.calls.read_text()
