"""How far the steps of a pipeline are, from their run folders alone: nothing of ours needs to be running."""

import json
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import newest, step_of
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.cluster.pipeline import Job
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.telemetry.metrics_file import METRICS_NAME, from_line
from ouro_megatron.telemetry.records import StepRecord

JOB_FILE = "job.json"
_TAIL_BYTES = 262_144


@dataclass(frozen=True)
class Attempts:
    """What the job's own notes tell."""

    starts: int
    last_event: str
    """"start", "requeue" or "end"; empty before the first start."""
    exit_code: int | None
    """Of the last end."""


def submitted_job(job: Job) -> int | None:
    """Id of the job that was last submitted for this step."""
    try:
        return int(json.loads((job.slurm_folder / JOB_FILE).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_finished(job: Job) -> bool:
    """Whether the step's checkpoint at its very end is there, complete."""
    found = newest(job.run_folder / "checkpoints")
    if found is None:
        return False
    if job.recipe is None:
        return True
    if read_state(found.folder).pending_evaluation:
        return False
    if job.recipe.budget.total is None:  # in epochs: the run knows its length
        last = last_record(job.run_folder)
        return last is not None and step_of(found.folder) == last.total_steps
    return step_of(found.folder) == BatchPlan(job.recipe).total_steps


def attempts(job: Job) -> Attempts:
    """Reads the notes that the batch script makes of each start and end."""
    try:
        lines = (job.slurm_folder / "attempts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return Attempts(0, "", None)
    events = [line.split(maxsplit=2)[1:] for line in lines if len(line.split()) >= 2]
    if not events:
        return Attempts(0, "", None)
    name, *rest = events[-1]
    code = int(rest[0]) if name == "end" and rest and rest[0].lstrip("-").isdigit() else None
    return Attempts(sum(event[0] == "start" for event in events), name, code)


def last_record(folder: Path) -> StepRecord | None:
    """The newest step in a run's metrics; only the end of the file is read."""
    steps = last_records(folder)
    return steps[-1] if steps else None


def last_records(folder: Path) -> list[StepRecord]:
    """The steps in the last part of a run's metrics, oldest first."""
    try:
        with (folder / METRICS_NAME).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = from_line(line)
        except (ValueError, TypeError):  # cut at the front, or being written
            continue
        if isinstance(record, StepRecord):
            found.append(record)
    return found
