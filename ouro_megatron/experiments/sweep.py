"""Runs the cells of a sweep in local worker processes, with progress; what is done stays done."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ouro_megatron.errors import STOPPED_EXIT_CODE, TrainingError
from ouro_megatron.experiments.cells import Cell
from ouro_megatron.experiments.plan import Sweep
from ouro_megatron.telemetry.metrics_file import METRICS_NAME, from_line
from ouro_megatron.telemetry.records import StepRecord
from ouro_megatron.training.signals import STOP_SIGNALS

Say = Callable[[str], None]
_POLL_SECONDS = 0.3


@dataclass
class Workers:
    """Worker processes on this machine. Stop signals are handed on: workers save their cells and leave."""

    sweep: Sweep
    cells: list[Cell]
    jobs: int
    nproc: int | None
    say: Say
    show: Callable[[list[str], int], None] = lambda lines, done: None
    """Told what is running and how many cells are done, again and again."""
    stopped: bool = False
    _processes: list[subprocess.Popen] = field(default_factory=list)

    def run(self) -> int:
        """0 when all cells are done, STOPPED_EXIT_CODE after a stop signal.

        Raises TrainingError naming the cells that failed and why, after all others were run.
        """
        left = [cell for cell in self.cells if self.sweep.result(cell) is None]
        attempt = f"{time.time():.3f}-{os.getpid()}"
        previous = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        try:
            for index in range(min(self.jobs, len(left))):
                self._processes.append(self._start(index, attempt))
            codes = self._wait(left)
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopped:
            return STOPPED_EXIT_CODE
        self._check(left, attempt, codes)
        return 0

    def _start(self, index: int, attempt: str) -> subprocess.Popen:
        logs = self.sweep.out / "log"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ouro_megatron.experiments.worker", str(self.sweep.out), "--die-with-parent"]
        command += ["--attempt", attempt, "--cells", ",".join(cell.name for cell in self.cells)]
        if self.nproc is not None:
            command += ["--nproc", str(self.nproc)]
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * (self.nproc or 1)))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (logs / f"worker-{index}.log").open("ab") as output:
            return subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and number == signal.SIGINT:
            for process in self._processes:
                process.kill()
        self.stopped = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _wait(self, left: list[Cell]) -> list[int]:
        """Until every worker has ended; tells of each cell that is done. Their exit codes."""
        waiting = list(left)
        while True:
            running = any(process.poll() is None for process in self._processes)
            for cell in list(waiting):
                result = self.sweep.result(cell)
                if result is not None:
                    waiting.remove(cell)
                    self.say(f"{cell.label}, seed {cell.seed}: {_short(result['metrics'])} ({result['seconds']:.0f} s)")
            self.show([line for cell in waiting if (line := self._progress(cell))], len(self.cells) - len(waiting))
            if not running:
                return [process.returncode for process in self._processes]
            time.sleep(_POLL_SECONDS)

    def _progress(self, cell: Cell) -> str | None:
        record = last_step(self.sweep.run_folder(cell) / METRICS_NAME)
        if record is None:
            return None
        return f"{cell.label}, seed {cell.seed}: step {record.step}/{record.total_steps}, loss {record.loss:.3f}"

    def _check(self, left: list[Cell], attempt: str, codes: list[int]) -> None:
        lines = []
        for cell in left:
            if self.sweep.result(cell) is not None:
                continue
            failure = self.sweep.failure(cell)
            if failure is not None and failure["attempt"] == attempt:
                lines.append(f"  {cell.name}: {failure['message'].strip().splitlines()[-1]}")
            else:
                ends = ", ".join(_end_of(code) for code in codes if code) or "no reason given"
                lines.append(f"  {cell.name}: its worker ended ({ends})")
        if lines:
            logs = self.sweep.out / "log"
            raise TrainingError(
                f"{len(lines)} of {len(left)} cells are not done:\n"
                + "\n".join(lines)
                + f"\nTheir output is in {logs}. "
                "Run the same command again: cells that are done stay, others go on from their checkpoints"
            )


def last_step(path: Path) -> StepRecord | None:
    """The last whole step record of a metrics file, read from its end; None without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = from_line(line)
        except (ValueError, TypeError):
            continue
        if isinstance(record, StepRecord):
            return record
    return None


def _short(metrics: dict[str, float]) -> str:
    """The numbers that tell a cell at a glance."""
    wanted = [
        name for name in metrics if name.startswith(("accuracy ", "attribute bits per", "loss last", "expected depth"))
    ]
    return ", ".join(f"{name} {metrics[name]:.4g}" for name in wanted)


def _end_of(code: int) -> str:
    if code < 0:
        hint = " (out of memory? see dmesg)" if code == -signal.SIGKILL else ""
        return signal.Signals(-code).name + hint
    return f"exit code {code}"
