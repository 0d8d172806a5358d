"""Data preparation as Slurm jobs: a tokenizer where one must be trained, an array over the shards, a merge after it.

The scripts are written beside the data, short enough to read and to submit by hand. Submitting again submits what is
missing only: array tasks whose shards are all there are left out.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.merge import write_json
from data_prep.plan import list_units, save_units
from data_prep.prepare import pending_shards, tokenizer_is_current
from data_prep.progress import Watcher
from data_prep.recipe import DataRecipe
from data_prep.shards import group_units
from ouro_megatron.errors import DataError

_CLIENT_SECONDS = 60


@dataclass(frozen=True)
class SlurmOptions:
    """What goes into the scripts' heads. None: the cluster's own default."""

    array_tasks: int = 16
    """Shares that the shards are dealt into; each is one task of the array."""
    max_running: int | None = None
    """Array tasks at one time."""
    cpus_per_task: int = 8
    """Tokenising processes of one array task."""
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()
    """More sbatch options, such as "--qos=low"."""


def submit(
    recipe: DataRecipe, recipe_file: Path, options: SlurmOptions, watcher: Watcher, *, dry_run: bool = False
) -> list[Path]:
    """Writes the scripts of what is left to do and submits them, each after the one before. Returns the scripts.

    `dry_run`: writes them only. Raises DataError when jobs of an earlier submission are not over, when Slurm
    refuses, or for a source that cannot be used.
    """
    folder = recipe.output / "slurm"
    if not dry_run:
        _check_free(folder)
    units = list_units(recipe)
    save_units(recipe, units)
    tasks = sum(len(group_units(found, recipe.shard_bytes)) for found in units.values())
    shares = min(options.array_tasks, tasks)
    has_tokenizer = tokenizer_is_current(recipe, units)
    left, merging = pending_shards(recipe, units, shares) if has_tokenizer else (list(range(shares)), True)
    if not merging:
        watcher.say("everything is up to date; nothing to submit")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    # Jobs read a copy: the recipe may be edited while they wait.
    copy = folder / "recipe.yaml"
    shutil.copyfile(recipe_file, copy)
    scripts = _Scripts(folder, copy, options)
    written = [] if has_tokenizer else [scripts.tokenizer()]
    written += [scripts.array(left, shares)] if left else []
    written.append(scripts.merge())
    watcher.say(f"{tasks:,} shards in {shares} shares; {len(left)} with work left. Scripts and logs: {folder}")
    if not dry_run:
        _submit_chain(folder, written, watcher)
    return written


class _Scripts:
    def __init__(self, folder: Path, recipe: Path, options: SlurmOptions) -> None:
        self._folder, self._options = folder.absolute(), options
        self._recipe = recipe.absolute()

    def tokenizer(self) -> Path:
        return self._write("tokenizer", "Trains the tokenizer.", [], f"tokenizer {self._quoted}")

    def array(self, shares: Sequence[int], count: int) -> Path:
        most = "" if self._options.max_running is None else f"%{self._options.max_running}"
        command = f'prepare {self._quoted} --shard "$SLURM_ARRAY_TASK_ID/{count}" --workers "$SLURM_CPUS_PER_TASK"'
        about = f"Tokenises the shards that are missing; array task i of {count} takes every {count}th shard from i on."
        return self._write("tokenise", about, [f"--array={_ranges(shares)}{most}"], command)

    def merge(self) -> Path:
        command = f'merge {self._quoted} --workers "$SLURM_CPUS_PER_TASK"'
        return self._write("merge", "Joins the shards to .bin/.idx pairs once all are there.", [], command)

    @property
    def _quoted(self) -> str:
        return shlex.quote(str(self._recipe))

    def _write(self, name: str, about: str, head: Sequence[str], command: str) -> Path:
        options = self._options
        log = "%A_%a" if any(line.startswith("--array") for line in head) else "%j"
        settings = {
            "--job-name": f"ouro-{name}",
            "--ntasks": 1,
            "--cpus-per-task": options.cpus_per_task,
            "--mem": options.memory,
            "--time": options.time,
            "--partition": options.partition,
            "--account": options.account,
            "--chdir": _quoted_path(Path.cwd()),
            "--output": _quoted_path(self._folder / f"{name}-{log}.log"),
            "--open-mode": "append",
        }
        lines = [f"{key}={value}" for key, value in settings.items() if value is not None]
        lines += ["--requeue", *head, *options.extra]
        script = self._folder / f"{name}.sbatch"
        script.write_text(
            "\n".join(
                [
                    "#!/bin/bash",
                    f"# {about} Written by `ouro data prepare --slurm`.",
                    *(f"#SBATCH {line}" for line in lines),
                    "",
                    "export OMP_NUM_THREADS=1",
                    f"exec {_ouro()} data {command}",
                    "",
                ]
            ),
            encoding="utf-8",
        )
        return script


def _submit_chain(folder: Path, scripts: Sequence[Path], watcher: Watcher) -> None:
    jobs: dict[str, str] = {}
    try:
        for script in scripts:
            # A job that waits for one that failed would wait for ever.
            after = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{list(jobs.values())[-1]}"] if jobs else []
            answer = _run("sbatch", "--parsable", *after, str(script))
            jobs[script.stem] = answer.strip().split(";")[0]
            watcher.say(f"{script.stem}: job {jobs[script.stem]}")
    finally:
        write_json(folder / "jobs.json", {"jobs": jobs})
    watcher.say("Submit again after a failure: only what is missing is done. `ouro data status` says how far it is.")


def _check_free(folder: Path) -> None:
    """Raises DataError while jobs of an earlier submission are waiting or running."""
    if shutil.which("sbatch") is None:
        raise DataError("--slurm: there is no sbatch on this machine; use --shard i/N and `ouro data merge` instead")
    try:
        earlier = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))["jobs"].values()
    except (OSError, ValueError, KeyError):
        return
    present = set(_run("squeue", "--noheader", "--me", "--format=%F").split())
    mine = [job for job in earlier if job in present]
    if mine:
        raise DataError(
            f"{folder.parent}: jobs {', '.join(mine)} of an earlier submission are not over; wait for them, or stop "
            f"them with `scancel {' '.join(mine)}`"
        )


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CLIENT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]}: no answer within {_CLIENT_SECONDS} s: is Slurm's controller up?") from error
    if done.returncode:
        raise DataError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _ouro() -> str:
    beside = Path(sys.executable).with_name("ouro")
    return (
        shlex.quote(str(beside))
        if os.access(beside, os.X_OK)
        else f"{shlex.quote(sys.executable)} -m ouro_megatron.cli"
    )


def _quoted_path(path: Path) -> str:
    """As a value in a #SBATCH line, which knows double quotes."""
    return f'"{path}"' if " " in str(path) else str(path)


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3,7" for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
