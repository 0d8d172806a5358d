"""`ouro status`: each step's state from squeue and the run folders. Reading only, at any time, by anybody."""

from dataclasses import dataclass
from typing import Literal

from ouro_megatron.checkpoint.folder import newest, step_of
from ouro_megatron.cluster import slurm
from ouro_megatron.cluster.checks import completed
from ouro_megatron.cluster.pipeline import Job, Pipeline
from ouro_megatron.cluster.progress import attempts, is_finished, last_records, submitted_job

State = Literal["finished", "running", "waiting", "stopped", "failed", "cancelled", "not submitted"]


@dataclass(frozen=True)
class StepStatus:
    """One line of the table."""

    name: str
    state: State
    detail: str
    """Nodes it runs on, why it waits, or how it ended."""
    job: int | None
    tokens: int
    total_tokens: int | None
    loss: float | None
    eta_seconds: float | None
    """Of its steps alone: time in the queue is not known."""
    restarts: int
    needs: tuple[str, ...]
    saved_step: int | None
    """Step of its newest complete checkpoint."""


def status(pipeline: Pipeline) -> list[StepStatus]:
    """All steps in order. Without Slurm on this machine, from the run folders alone. Raises ClusterError when the
    controller does not answer."""
    ids = {job.name: submitted_job(job) for job in pipeline.jobs}
    known = [number for number in ids.values() if number is not None]
    states = slurm.states(known) if slurm.is_there() else {}
    return [_status(completed(job), ids[job.name], states) for job in pipeline.jobs]


def _status(job: Job, number: int | None, states: dict[int, slurm.JobState]) -> StepStatus:
    tried = attempts(job)
    records = last_records(job.run_folder)
    saved = newest(job.run_folder / "checkpoints")
    state, detail = _state(job, number, states)
    last = records[-1] if records else None
    eta = None
    if last is not None and state == "running":
        recent = records[-20:]
        eta = (last.total_steps - last.step) * sum(record.seconds for record in recent) / len(recent)
    return StepStatus(
        name=job.name,
        state=state,
        detail=detail,
        job=number,
        tokens=last.tokens if last is not None else 0,
        total_tokens=last.total_tokens if last is not None else _budget(job),
        loss=last.loss if last is not None else None,
        eta_seconds=eta,
        restarts=max(0, tried.starts - 1),
        needs=job.needs,
        saved_step=None if saved is None else step_of(saved.folder),
    )


def _budget(job: Job) -> int | None:
    if job.recipe is None or job.recipe.budget.total is None:
        return None
    from ouro_megatron.recipe.schedule import BatchPlan

    return BatchPlan(job.recipe).total_tokens


def _state(job: Job, number: int | None, states: dict[int, slurm.JobState]) -> tuple[State, str]:
    queued = states.get(number) if number is not None else None
    if queued is not None and not queued.is_over:
        if queued.state in ("RUNNING", "COMPLETING"):
            return "running", queued.reason
        return "waiting", queued.reason
    if is_finished(job):
        return "finished", ""
    if number is None:
        return "not submitted", ""
    tried = attempts(job)
    log = job.slurm_folder / f"job-{number}.log"
    if queued is not None and queued.state == "CANCELLED":
        if not tried.starts:
            return "cancelled", "before it started; did a step before it fail?"
        return "cancelled", f"submit again to go on; {log}"
    if queued is not None and queued.state != "FAILED":
        return "failed", f"Slurm: {queued.state}; {log}"
    if tried.last_event == "end" and tried.exit_code not in (None, 0, 75):
        return "failed", f"exit code {tried.exit_code}; {log}"
    if not tried.starts:
        return "stopped", "its job is gone and never started"
    return "stopped", f"its job is gone; submit again to go on; {log}"
