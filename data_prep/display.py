"""Shows how data preparation goes: a live panel in a terminal, plain lines in a log."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_prep.pool import Work
from data_prep.progress import State

_REDRAW_SECONDS = 0.25
_LINE_SECONDS = 30.0
_MOST_WORKERS = 24
"""Workers that get a line of their own."""


class Display:
    """A `Watcher`. Use it as a context manager, so that the terminal is left as it was."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None
        self._shown = 0.0
        self._state: State | None = None
        self._pace: dict[int, tuple[str, float]] = {}

    def update(self, state: State) -> None:
        self._state = state
        now = time.monotonic()
        if self._live is not None:
            if now - self._shown >= _REDRAW_SECONDS:
                self._shown = now
                self._live.update(self._panel(state), refresh=True)
        elif now - max(self._shown, state.began) >= _LINE_SECONDS:
            self._shown = now
            self.say(summary(state))

    def end(self) -> None:
        if self._state is not None and self._state.work.tokens:
            self.say(f"{self._state.what}: {_amounts(self._state)}, in {_duration(self._state.seconds)}")
        self._state = None
        if self._live is not None:
            self._live.update(Text(""), refresh=True)

    def say(self, line: str) -> None:
        self._console.print(line)

    def _panel(self, state: State) -> Group:
        bar = ProgressBar(total=max(state.total_bytes, 1), completed=state.done_bytes, width=40)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            state.what, bar, f"{shown_bytes(state.done_bytes)} of {shown_bytes(state.total_bytes)}", _left(state)
        )
        workers = Table.grid(padding=(0, 2))
        for number, (item, work) in sorted(state.running.items())[:_MOST_WORKERS]:
            workers.add_row(f"  worker {number}", *_columns(work, self._seconds(number, item.label)), item.label)
        return Group(head, Text(_amounts(state)), workers)

    def _seconds(self, worker: int, label: str) -> float:
        """Since the worker began with its item."""
        if worker not in self._pace or self._pace[worker][0] != label:
            self._pace[worker] = (label, time.monotonic())
        return max(time.monotonic() - self._pace[worker][1], 1e-6)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def summary(state: State) -> str:
    """One line for a log."""
    done = f"{shown_bytes(state.done_bytes)} of {shown_bytes(state.total_bytes)}"
    workers = f"{len(state.running)} worker{'s' if len(state.running) != 1 else ''}"
    return f"{state.what}: {done}, {_amounts(state)}, {_left(state)}, {workers}"


def _amounts(state: State) -> str:
    work = state.work
    if not work.text_bytes:
        return f"{work.documents:,} documents, {work.tokens:,} tokens"
    speed = f"{work.text_bytes / state.seconds / 1e6:.1f} MB/s, {work.tokens / state.seconds / 1e6:.2f} Mtokens/s"
    return f"{work.documents:,} documents, {work.tokens:,} tokens, {shown_bytes(work.text_bytes)} of text, {speed}"


def _columns(work: Work, seconds: float) -> tuple[str, str, str]:
    speed = f"{work.text_bytes / seconds / 1e6:.1f} MB/s" if work.text_bytes else ""
    return f"{work.documents:,} documents", f"{work.tokens:,} tokens", speed


def _left(state: State) -> str:
    return "" if state.seconds_left is None else f"{_duration(state.seconds_left)} left"


def shown_bytes(count: float) -> str:
    """Such as "1.4 TB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
