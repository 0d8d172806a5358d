"""Runs items on workers and says how it goes: bars in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_prep.pool import Begun, Done, Failed, Pulse, Pulsed, Work, died_message, run

_MOST_FAILURES = 20
"""Items that may fail before the rest is not tried any more."""


class Item(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def label(self) -> str: ...


@dataclass
class State:
    """How far the work is."""

    what: str
    total_bytes: int
    """On disk."""
    skipped_bytes: int = 0
    """Done before this run."""
    finished_bytes: int = 0
    finished: Work = field(default_factory=Work)
    """Of the items that are finished."""
    running: dict[int, tuple[Item, Work]] = field(default_factory=dict)
    """By worker."""
    began: float = field(default_factory=time.monotonic)

    @property
    def work(self) -> Work:
        """All of this run."""
        parts = [self.finished, *(work for _, work in self.running.values())]
        return Work(
            sum(part.documents for part in parts),
            sum(part.tokens for part in parts),
            sum(part.text_bytes for part in parts),
        )

    @property
    def done_bytes(self) -> int:
        """On disk, with an estimate for the items that are being worked on: their text against that of the others."""
        ratio = self.finished.text_bytes / self.finished_bytes if self.finished_bytes else 1.0
        begun = (
            sum(min(item.size, int(work.text_bytes / ratio)) for item, work in self.running.values()) if ratio else 0
        )
        return self.skipped_bytes + self.finished_bytes + begun

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-6)

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None before there is one."""
        here = self.done_bytes - self.skipped_bytes
        return None if here <= 0 else max(0.0, (self.total_bytes - self.done_bytes) * self.seconds / here)


class Watcher(Protocol):
    """Is told how the work goes on."""

    def update(self, state: State) -> None:
        """Called often; what it shows is its own choice."""

    def end(self) -> None:
        """The work that `update` told of is over."""

    def say(self, line: str) -> None: ...


class Tracker:
    """Runs one kind of work."""

    def __init__(self, what: str, watcher: Watcher, total: int) -> None:
        self._watcher = watcher
        self._state = State(what, total)

    def skip(self, size: int) -> None:
        """Bytes that were done before."""
        self._state.skipped_bytes += size

    def run(
        self,
        function: Callable[[Any, Pulse], Any],
        items: Sequence[Any],
        workers: int,
        done: Callable[[Any, Any], None],
    ) -> None:
        """`done(item, result)` for each item. An item whose worker died is tried once more, alone, after the others:
        what ran out of memory beside others may fit by itself. Raises DataError naming what failed again.
        """
        try:
            failures = self._pass(function, items, workers, done)
            again = [failure for failure in failures if failure.died]
            if again:
                names = ", ".join(failure.item.label for failure in again)
                self._watcher.say(f"{len(again)} worker(s) died ({again[0].reason}); once more, alone: {names}")
                failures = [failure for failure in failures if not failure.died]
                for failure in again:
                    failures += self._pass(function, [failure.item], 2, done)
        finally:
            self._watcher.end()
        if failures:
            raise died_message(failures, lambda item: item.label)

    def _pass(
        self,
        function: Callable[[Any, Pulse], Any],
        items: Sequence[Any],
        workers: int,
        done: Callable[[Any, Any], None],
    ) -> list[Failed[Any]]:
        failures: list[Failed[Any]] = []
        state = self._state
        events = run(function, items, workers)
        try:
            for event in events:
                if isinstance(event, Begun):
                    state.running[event.worker] = (event.item, Work())
                elif isinstance(event, Pulsed):
                    state.running[event.worker] = (event.item, event.work)
                elif isinstance(event, Failed):
                    del state.running[event.worker]
                    failures.append(event)
                    self._watcher.say(f"{event.item.label}: {event.reason}")
                    if len(failures) == _MOST_FAILURES:
                        raise died_message(failures, lambda item: item.label)
                elif isinstance(event, Done):
                    _, work = state.running.pop(event.worker)
                    self._finish(event, work)
                    done(event.item, event.result)
                    continue  # its worker begins the next item now; without it the picture would lack a worker
                self._watcher.update(state)
        finally:
            events.close()
        return failures

    def _finish(self, event: Done[Any, Any], pulsed: Work) -> None:
        state, result = self._state, event.result
        work = result.work if hasattr(result, "work") else pulsed
        state.finished = Work(
            state.finished.documents + work.documents,
            state.finished.tokens + work.tokens,
            state.finished.text_bytes + work.text_bytes,
        )
        state.finished_bytes += event.item.size
