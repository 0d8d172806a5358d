"""Slurm's commands, each with a time limit: a client of a controller that is away would wait for ever."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.cluster.settings import seconds_of
from ouro_megatron.errors import ClusterError

_SECONDS = 60.0
_NOBODY = ("Unable to contact slurm controller", "configuration source", "Unknown host")
"""What sbatch says without a controller, or without a slurm.conf that names one."""
ENDED = frozenset(
    (
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
        "OUT_OF_MEMORY",
        "REVOKED",
    )
)


@dataclass(frozen=True)
class JobState:
    """What squeue knows of a job."""

    job: int
    state: str
    """PENDING, RUNNING, COMPLETING ... in Slurm's words."""
    reason: str
    """Why it is not running, or the nodes it runs on."""

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


def is_there() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Raises ClusterError when the command is missing or its controller does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError as error:
        raise ClusterError(
            f"{command[0]} is not there: run this on a login node of the cluster (--dry-run and --local work here)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{command[0]}: no answer within {_SECONDS:g} s; is the Slurm controller up?") from error


def test(script: Path) -> str | None:
    """Why sbatch would refuse the script; None when it would take it. Raises ClusterError when nobody answers."""
    done = run("sbatch", "--test-only", str(script))
    if done.returncode and any(words in done.stderr for words in _NOBODY):
        raise ClusterError(
            f"sbatch reaches no Slurm controller ({_first_line(done.stderr)}): run this on a login node, or see "
            "whether Slurm is up (`scontrol ping`)"
        )
    return None if done.returncode == 0 else _first_line(done.stderr)


def time_limits() -> dict[str, int]:
    """Seconds that jobs may run by partition, those without a limit left out; "" is the default one. Empty where sinfo
    says nothing."""
    done = run("sinfo", "--noheader", "--format=%P|%l")
    limits = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, limit = line.strip().partition("|")
        if limit[:1].isdigit():
            limits[name.rstrip("*")] = seconds_of(limit)
            if name.endswith("*"):
                limits[""] = seconds_of(limit)
    return limits


def submit(script: Path, after: Sequence[int]) -> int:
    """The id of the new job, which starts once all jobs in `after` have succeeded. Raises ClusterError."""
    dependency = [f"--dependency=afterok:{':'.join(map(str, after))}"] if after else []
    done = run("sbatch", "--parsable", *dependency, str(script))
    if done.returncode:
        raise ClusterError(f"sbatch refused {script}: {_first_line(done.stderr)}")
    return int(done.stdout.strip().split(";")[0])


def cancel(jobs: Sequence[int]) -> None:
    """Raises ClusterError when scancel fails."""
    done = run("scancel", *map(str, jobs))
    if done.returncode:
        raise ClusterError(f"scancel: {_first_line(done.stderr)}")


def states(jobs: Sequence[int]) -> dict[int, JobState]:
    """What Slurm still knows of these jobs; it forgets those that ended some minutes ago (MinJobAge)."""
    if not jobs:
        return {}
    wanted = ",".join(map(str, jobs))
    done = run("squeue", "--noheader", "--states=all", f"--jobs={wanted}", "--format=%i|%T|%R")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ClusterError(f"squeue: {_first_line(done.stderr)}")
    found = {}
    for line in done.stdout.splitlines():
        number, state, reason = line.strip().split("|", 2)
        found[int(number)] = JobState(int(number), state, reason.strip("()"))
    return found


def _first_line(text: str) -> str:
    lines = [line.split("error: ", 1)[-1].strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
