"""The console: a live line in a terminal, one plain line a step elsewhere."""

import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from ouro_megatron.telemetry.records import EvalRecord, EventRecord, Record, StepRecord
from ouro_megatron.telemetry.sink import RunInfo
from ouro_megatron.telemetry.text import big, duration, evaluation_line, per_loop, step_line

_STYLES = {"warning": "yellow", "checkpoint": "green", "stop": "yellow", "rollback": "red"}


class ConsoleSink:
    """Shows a run to a person. `every`: steps between lines when the output is not a terminal."""

    def __init__(self, every: int, console: Console | None = None) -> None:
        self._every = every
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._recent: deque[float] = deque(maxlen=20)
        self._total = 0
        self._done = 0
        self._started = time.monotonic()
        self._last: StepRecord | None = None

    def start(self, run: RunInfo) -> None:
        self._total, self._done = run.total_steps, run.start_step
        going_on = f", going on from step {run.start_step}" if run.resumed else ""
        self._print(
            f"[bold]{escape(run.name)}[/]: {big(run.parameters)} parameters on {run.world}, {run.total_steps} steps"
            f"{going_on}; files in {escape(str(run.run_folder))}"
        )
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def write(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._recent.append(record.seconds)
            self._last, self._done = record, record.step
            if self._live is not None:
                self._live.update(self._panel(record))
            elif record.step % self._every == 0 or record.step == record.total_steps:
                self._print(escape(step_line(record, self._eta(record))))
        elif isinstance(record, EvalRecord):
            self._print(f"[bold cyan]{escape(evaluation_line(record))}[/]")
        elif isinstance(record, EventRecord) and record.name != "failure":  # the command ends with that message itself
            style = _STYLES.get(record.name, "dim")
            self._print(f"[{style}]{record.name}: {escape(record.message)}[/]")

    def close(self, summary: str | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._last is not None:
            wall = duration(time.monotonic() - self._started)
            self._print(escape(f"{self._done}/{self._total} steps done, {wall} in this process"))
            self._last = None
        if summary:
            self._print(escape(summary))

    def _eta(self, record: StepRecord) -> float:
        return (record.total_steps - record.step) * sum(self._recent) / len(self._recent)

    def _panel(self, record: StepRecord) -> Table:
        """Two lines: the bar with what is left, and the numbers of the last step."""
        grid = Table.grid(padding=(0, 2))
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=record.total_steps, completed=record.step, width=30),
            f"[bold]{record.step}/{record.total_steps}[/]",
            f"{big(record.tokens)} of {big(record.total_tokens)} tokens",
            f"ETA {duration(self._eta(record))}",
            f"{big(record.tokens_per_second)} tok/s" + ("" if record.mfu is None else f", MFU {record.mfu:.1%}"),
        )
        grid.add_row(bar)
        skipped = f"  [yellow]skipped {record.skipped_steps}[/]" if record.skipped_steps else ""
        grid.add_row(
            f"loss [bold]{record.loss:.4f}[/]  by loop [cyan]{per_loop(record.loops.ce)}[/]  "
            f"depth {record.loops.expected_depth:.2f}  grad {record.grad_norm:.3f}  lr {record.lr:.2e}{skipped}"
        )
        return grid

    def _print(self, text: str) -> None:
        self._console.print(text)
