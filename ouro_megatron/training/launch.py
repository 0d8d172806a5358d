"""Starts the ranks of one node, forwards signals, and turns the first failure into one clear message.

torchrun is not used here because it gives workers 30 seconds after TERM before it kills them, too short for a large
save, does not forward USR1, and replaces the ranks' exit codes by its own. Ranks started by torchrun or srun work too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ouro_megatron.checkpoint.folder import newest, step_of
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.data.complete import complete
from ouro_megatron.errors import STOPPED_EXIT_CODE, OuroError, TrainingError
from ouro_megatron.parallel.verdict import is_consequence
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.validate import check_recipe, ranks_needed
from ouro_megatron.training.failure import FAILURE_FOLDER
from ouro_megatron.training.signals import STOP_SIGNALS, StopSignals
from ouro_megatron.training.worker import adopt_slurm_environment, run_worker

_GRACE_SECONDS = 10.0
"""Between the first failure and killing the other ranks: long enough for them to say what they saw."""
_LEAVE_SECONDS = 2.0
"""The same once a rank has named the one that holds up all others."""

_SIGNAL_HINTS = {
    "SIGKILL": " (out of memory? see dmesg)",
    "SIGBUS": " (a mapped data file was cut short, or its disk failed: check it with `ouro data verify`)",
}


class LaunchedFailure(TrainingError):
    """A rank failed; carries that rank's exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train(recipe: Recipe, nproc: int | None) -> int:
    """Trains a stage and returns the exit code: 0 at its end, STOPPED_EXIT_CODE after a stop signal.

    Starts `nproc` ranks on this machine (the fewest the layout needs when None), unless this process is already one of
    several started by torchrun or srun. Raises RecipeError before anything is started, and the failing rank's error.
    """
    adopt_slurm_environment()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        signals = StopSignals()
        signals.install()  # before the data's sizes are read: a stop meanwhile is no failure
        check_recipe(recipe, int(os.environ["WORLD_SIZE"]))
        recipe = complete(recipe)
        check_recipe(recipe, int(os.environ["WORLD_SIZE"]))
        with _recipe_file(recipe) as file:
            return run_worker(file, signals)
    ranks = nproc or ranks_needed(recipe)
    check_recipe(recipe, ranks)
    recipe = complete(recipe)
    check_recipe(recipe, ranks)  # the schedule against a budget in epochs
    if is_finished(recipe):
        print(
            f"{recipe.name} is finished: {recipe.run_folder / 'checkpoints'} holds its last step. "
            "Choose another name to train again, or a longer budget.total to go on."
        )
        return 0
    with _recipe_file(recipe) as file, tempfile.TemporaryDirectory(prefix="ouro-failures-") as failures:
        return Ranks(recipe, file, ranks, Path(failures)).run()


def is_finished(recipe: Recipe) -> bool:
    """Whether the run folder holds the last step, evaluated. The recipe must be complete (data/complete.py)."""
    found = newest(recipe.run_folder / "checkpoints")
    if found is None or (step_of(found.folder) or 0) != BatchPlan(recipe).total_steps:
        return False
    return not read_state(found.folder).pending_evaluation


@contextmanager
def _recipe_file(recipe: Recipe) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ouro-recipe-") as folder:
        file = Path(folder) / f"{recipe.name}.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        yield file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RankProcess(Protocol):
    """What the launcher needs of a rank's process; subprocess.Popen has it."""

    returncode: int | Any

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class Ranks:
    """The processes of one launch."""

    def __init__(self, recipe: Recipe, recipe_file: Path, ranks: int, failures: Path) -> None:
        self._recipe = recipe
        self._file = recipe_file
        self._count = ranks
        self._failures = failures
        self._processes: list[RankProcess] = []
        self._interrupts = 0
        self._early: list[int] = []
        """Stop signals that came before all ranks were started."""

    def run(self) -> int:
        previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        try:
            self._start()
            return self._wait()
        finally:
            self._kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start(self) -> None:
        logs = self._recipe.run_folder / "log"
        logs.mkdir(parents=True, exist_ok=True)
        port = str(_free_port())
        for rank in range(self._count):
            environment = {
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._count)),
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                FAILURE_FOLDER: str(self._failures),
            }
            self._processes.append(self._spawn(rank, environment, logs / f"rank-{rank}.log"))
        for number in self._early:
            self._send(number)

    def _spawn(self, rank: int, environment: dict[str, str], log: Path) -> "RankProcess":
        command = [sys.executable, "-m", "ouro_megatron.training.worker", str(self._file)]
        if rank == 0:
            return subprocess.Popen(command, env=environment, start_new_session=True)
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Ranks act at their next safe point. A second Ctrl-C ends them at once."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._kill()
                return
        if len(self._processes) < self._count:
            self._early.append(number)
        else:
            self._send(number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _wait(self) -> int:
        while True:
            codes = [process.poll() for process in self._processes]
            if any(code not in (None, 0, STOPPED_EXIT_CODE) for code in codes):
                self._fail()
            if all(code is not None for code in codes):
                return STOPPED_EXIT_CODE if STOPPED_EXIT_CODE in codes else 0
            time.sleep(0.05)

    def _fail(self) -> None:
        """Waits a little for the other ranks, then raises the error that came first."""
        if self._interrupts > 1:
            raise LaunchedFailure("interrupted twice: ended without saving", 130)
        first = [rank for rank, process in enumerate(self._processes) if process.poll() not in (None, 0)]
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            if any(report["final"] for report in self._reports().values()):  # what is left is frozen
                deadline = min(deadline, time.monotonic() + _LEAVE_SECONDS)
            time.sleep(0.05)
        self._kill()
        raise self._explain(first)

    def _explain(self, first: list[int]) -> OuroError:
        reports = self._reports()
        # A rank killed from outside wrote nothing and is the cause of whatever the others report.
        for rank in first:
            code = self._processes[rank].returncode
            if rank not in reports and code < 0:
                name = signal.Signals(-code).name
                hint = _SIGNAL_HINTS.get(name, "")
                seen = [report["last_seen"].get(str(rank)) for report in reports.values()]
                where = next((f" in {place}" for place in seen if place), "")
                return LaunchedFailure(
                    f"rank {rank} was ended by {name}{hint}{where}; the run was stopped. "
                    "Start it again to go on from its last checkpoint",
                    TrainingError.exit_code,
                )
        causes = [rank for rank in sorted(reports) if not is_consequence(reports[rank]["message"])]
        rank = next((rank for rank in first if rank in causes), None) or next(iter(causes or sorted(reports)), first[0])
        report = reports.get(rank)
        if report is None:
            log = self._recipe.run_folder / "log" / f"rank-{rank}.log"
            where = f"; see {log}" if rank else ""
            return LaunchedFailure(f"rank {rank} ended with exit code {self._processes[rank].returncode}{where}", 1)
        message = report["message"] if report["expected"] else f"rank {rank} failed unexpectedly:\n{report['message']}"
        return LaunchedFailure(message, report["code"])

    def _reports(self) -> dict[int, dict]:
        return {
            int(file.stem): json.loads(file.read_text(encoding="utf-8"))
            for file in self._failures.glob("*.json")
            if not file.name.startswith(".")
        }

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
