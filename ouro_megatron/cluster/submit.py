"""Submits the steps of a pipeline as Slurm jobs that wait for each other, or runs them here one after the other."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.cluster import slurm
from ouro_megatron.cluster.checks import completed, data_problems, find_problems
from ouro_megatron.cluster.pipeline import Job, Pipeline
from ouro_megatron.cluster.progress import JOB_FILE, is_finished, submitted_job
from ouro_megatron.cluster.script import SCRIPT, render
from ouro_megatron.errors import ClusterError, OuroError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a submission does with each step."""

    submit: tuple[Job, ...]
    running: dict[str, int]
    """Steps whose job is in the queue or runs already."""
    finished: tuple[str, ...]


def plan(pipeline: Pipeline, first: str | None = None, last: str | None = None) -> Plan:
    """Which of the steps between `first` and `last` are left to submit. Raises ClusterError."""
    chosen = pipeline.between(first, last)
    ids = {job.name: submitted_job(job) for job in pipeline.jobs}
    known = [number for number in ids.values() if number is not None]
    states = slurm.states(known) if slurm.is_there() else {}
    running = {
        name: number
        for name, number in ids.items()
        if number is not None and number in states and not states[number].is_over
    }
    finished = tuple(job.name for job in chosen if job.name not in running and is_finished(job))
    left = [job for job in chosen if job.name not in running and job.name not in finished]
    return Plan(tuple(completed(job) for job in left), running, finished)


def check(pipeline: Pipeline, wanted: Plan, project: Path) -> None:
    """Raises ClusterError with everything that is known to be wrong, one problem a line."""
    problems = find_problems(pipeline, wanted.submit, wanted.running, project)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ClusterError(f"pipeline {pipeline.name} cannot be submitted; nothing was:{lines}")


def submit(pipeline: Pipeline, wanted: Plan, project: Path, say: Say) -> dict[str, int]:
    """Job ids by step. Writes each step's script and recipe into its run folder first. Raises ClusterError when sbatch
    refuses one; those submitted before it are cancelled then."""
    check(pipeline, wanted, project)
    new: dict[str, int] = {}
    ids = dict(wanted.running)
    for name in wanted.finished:
        say(f"{name}: finished already")
    for name, number in wanted.running.items():
        say(f"{name}: job {number} already")
    try:
        for job in wanted.submit:
            script = write_job(job, pipeline, project)
            after = [ids[need] for need in job.needs if need in ids]
            number = slurm.submit(script, after)
            ids[job.name] = new[job.name] = number
            described = {"job": number, "name": job.name, "pipeline": pipeline.name, "after": after}
            write_json(job.slurm_folder / JOB_FILE, {**described, "submitted": time.time()})
            waits = f", after {', '.join(map(str, after))}" if after else ""
            nodes = job.nodes if job.recipe is not None else 1
            where = f"{nodes} {'node' if nodes == 1 else 'nodes'}"
            say(f"{job.name}: job {number} on {where}{waits}; {script}")
    except (OuroError, OSError) as error:
        if new:
            slurm.cancel(list(new.values()))
        raise ClusterError(f"{error}; the {len(new)} jobs submitted before it were cancelled") from error
    return new


def write_job(job: Job, pipeline: Pipeline, project: Path) -> Path:
    """Writes the step's script and, for a stage, its complete recipe; returns the script."""
    folder = job.slurm_folder
    folder.mkdir(parents=True, exist_ok=True)
    if job.recipe is not None:
        (folder / "recipe.yaml").write_text(dump_recipe(job.recipe), encoding="utf-8")
    (folder / "failures").unlink(missing_ok=True)
    script = folder / SCRIPT
    script.write_text(render(job, pipeline.cluster, pipeline.name, project), encoding="utf-8")
    script.chmod(0o755)
    return script


def cancel(pipeline: Pipeline, names: Sequence[str], say: Say) -> list[int]:
    """Cancels the jobs of these steps, or of all, that are not over; ranks that run save first. Returns their ids."""
    chosen = [pipeline.job(name) for name in names] or list(pipeline.jobs)
    ids = {job.name: number for job in chosen if (number := submitted_job(job)) is not None}
    states = slurm.states(list(ids.values()))
    living = {name: number for name, number in ids.items() if number in states and not states[number].is_over}
    if living:
        # Those that wait first: none may start because another has just gone.
        order = sorted(living.values(), key=lambda number: states[number].state == "RUNNING")
        slurm.cancel(order)
    for name, number in living.items():
        say(f"{name}: job {number} cancelled ({states[number].state})")
    if not living:
        say("no job is waiting or running")
    return list(living.values())


def run_here(pipeline: Pipeline, wanted: Plan, train: Callable[[Recipe], int], say: Say) -> int:
    """Runs the steps one after the other on this machine, stages by `train`, which returns an exit code. Returns that
    of the first that does not finish, else 0. Raises OuroError as the steps do."""
    from ouro_megatron.checkpoint.average import average_files
    from ouro_megatron.evaluation.upcycled import upcycle_and_compare

    problems = list(data_problems(wanted.submit))
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ClusterError(f"pipeline {pipeline.name} cannot run; nothing was started:{lines}")
    for name in wanted.finished:
        say(f"{name}: finished already")
    for job in wanted.submit:
        say(f"--- {job.name}")
        if job.recipe is not None:
            code = train(job.recipe)
            if code:
                return code
            continue
        assert job.source is not None
        if job.upcycle is not None:
            made = job.upcycle
            upcycle_and_compare(
                job.source,
                job.made,
                made.layers,
                made.map,
                optimizer=made.optimizer,
                residual_scale=made.residual_scale,
                sequences=made.sequences,
            )
        else:
            assert job.average is not None
            average_files([job.source], job.made, job.average.last)
        say(f"wrote {job.made}")
    return 0


def project_folder() -> Path:
    """Recipes' relative paths are meant from here, on every node."""
    return Path.cwd().resolve()
