"""A sweep as a Slurm job array: one task a cell, a job after it that writes the summary."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.cluster import slurm
from ouro_megatron.errors import ClusterError
from ouro_megatron.experiments.cells import Cell
from ouro_megatron.experiments.plan import Sweep

GRACE_SECONDS = 120
"""How long before the time limit a cell is told to save."""


@dataclass(frozen=True)
class ArrayOptions:
    """What goes into the scripts' heads. None: the cluster's own default."""

    max_running: int | None = None
    """Tasks at one time."""
    gpus: int = 0
    """Of each task; as many ranks train a cell, one without GPUs."""
    cpus_per_task: int = 4
    memory: str | None = None
    time: str | None = None
    """Of one task; the settings' `hours` when None."""
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()
    """More sbatch options, such as "--qos=low"."""


def submit(sweep: Sweep, cells: Sequence[Cell], options: ArrayOptions, *, dry_run: bool = False) -> list[Path]:
    """Writes the array's script and the summary's, and submits them. Returns the scripts; none when nothing is left.

    A task that is preempted or reaches its time limit saves its cell, is requeued and goes on. Raises ClusterError
    when jobs of an earlier submission are not over, or Slurm refuses.
    """
    left = [cell for cell in cells if sweep.result(cell) is None]
    folder = sweep.out / "slurm"
    if not left:
        return []
    if not dry_run:
        _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = folder / "cells.txt"
    names.write_text("".join(f"{cell.name}\n" for cell in left), encoding="utf-8")
    scripts = [_array(sweep, names, len(left), options), _summary(sweep, options)]
    if dry_run:
        return scripts
    # The summary is written whatever became of the cells: it says which are missing.
    array = slurm.submit(scripts[0], [])
    write_json(folder / "jobs.json", {"jobs": [array]})
    last = _submit_after_any(scripts[1], array)
    write_json(folder / "jobs.json", {"jobs": [array, last]})
    return scripts


def submitted(sweep: Sweep) -> list[int]:
    """Jobs of the last submission; empty without one."""
    try:
        jobs = json.loads((sweep.out / "slurm" / "jobs.json").read_text(encoding="utf-8"))["jobs"]
    except (OSError, ValueError, KeyError):
        return []
    return [int(job) for job in jobs]


def _submit_after_any(script: Path, array: int) -> int:
    done = slurm.run("sbatch", "--parsable", f"--dependency=afterany:{array}", str(script))
    if done.returncode:
        raise ClusterError(f"sbatch refused {script}: {(done.stderr or done.stdout).strip()}")
    return int(done.stdout.strip().split(";")[0])


def _check_free(folder: Path) -> None:
    if not slurm.is_there():
        raise ClusterError("--slurm: there is no sbatch on this machine; leave it out to run the cells here")
    try:
        earlier = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))["jobs"]
    except (OSError, ValueError, KeyError):
        return
    present = set(
        slurm.run(
            "squeue", "--noheader", "--me", "--states=PENDING,RUNNING,SUSPENDED,COMPLETING", "--format=%F"
        ).stdout.split()
    )
    mine = [str(job) for job in earlier if str(job) in present]
    if mine:
        raise ClusterError(
            f"{folder.parent}: jobs {', '.join(mine)} of an earlier submission are not over; wait for them, or stop "
            f"them with `scancel {' '.join(mine)}`"
        )


def _array(sweep: Sweep, names: Path, count: int, options: ArrayOptions) -> Path:
    most = "" if options.max_running is None else f"%{options.max_running}"
    head = [f"--array=0-{count - 1}{most}", "--requeue", f"--signal=B:USR1@{GRACE_SECONDS}"]
    if options.gpus:
        head.append(f"--gpus-per-task={options.gpus}")
    worker = (
        f"{shlex.quote(sys.executable)} -m ouro_megatron.experiments.worker {shlex.quote(str(sweep.out.resolve()))}"
    )
    ranks = f" --nproc {options.gpus}" if options.gpus > 1 else ""
    body = [
        f'cell=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(names.resolve()))})',
        "# A stop signal goes to this shell alone: it is handed on, and the worker saves the cell and leaves with 75.",
        'stop() { kill -s USR1 "$worker" 2>/dev/null; }',
        "trap stop TERM USR1",
        f'{worker} --cells "$cell" --attempt "$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"{ranks} &',
        "worker=$!",
        'while wait "$worker"; code=$?; kill -0 "$worker" 2>/dev/null; do :; done',
        'if [ "$code" -eq 75 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    return _write(sweep, "cells", f"Trains the cells of {sweep.out.name}, one a task.", head, body, options, "%A_%a")


def _summary(sweep: Sweep, options: ArrayOptions) -> Path:
    out = shlex.quote(str(sweep.out.resolve()))
    start = shlex.quote("from ouro_megatron.cli import main; main()")
    body = [f"exec {shlex.quote(sys.executable)} -c {start} experiment summary --out {out}"]
    plain = ArrayOptions(
        cpus_per_task=1, partition=options.partition, account=options.account, time="0:30:00", extra=options.extra
    )
    return _write(sweep, "summary", f"Writes the summary of {sweep.out.name}.", [], body, plain, "%j")


def _write(
    sweep: Sweep, name: str, about: str, head: Sequence[str], body: Sequence[str], options: ArrayOptions, log: str
) -> Path:
    folder = (sweep.out / "slurm").resolve()
    settings = {
        "--job-name": f"ouro-{sweep.name}-{name}",
        "--ntasks": 1,
        "--cpus-per-task": options.cpus_per_task,
        "--mem": options.memory,
        "--time": options.time or sweep.settings.hours,
        "--partition": options.partition,
        "--account": options.account,
        "--chdir": _quoted(Path.cwd()),
        "--output": _quoted(folder / f"{name}-{log}.log"),
        "--open-mode": "append",
    }
    lines = [f"{key}={value}" for key, value in settings.items() if value is not None]
    threads = max(1, options.cpus_per_task // max(1, options.gpus))
    script = folder / f"{name}.sbatch"
    script.write_text(
        "\n".join(
            [
                "#!/bin/bash",
                f"# {about} Written by `ouro experiment --slurm`.",
                *(f"#SBATCH {line}" for line in [*lines, *head, *options.extra]),
                "",
                f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
                *([f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"] if "PYTHONPATH" in os.environ else []),
                *body,
                "",
            ]
        ),
        encoding="utf-8",
    )
    return script


def _quoted(path: Path) -> str:
    """As a value in a #SBATCH line, which knows double quotes."""
    return f'"{path}"' if " " in str(path) else str(path)
