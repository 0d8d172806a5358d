"""When a rank's forward and backward tasks ran, recorded through the timers that Megatron's schedules call."""

import time
from typing import Any, Literal, NamedTuple

import torch


class TaskTime(NamedTuple):
    """One task of the schedule on this rank, in the order in which tasks ran."""

    kind: Literal["forward", "backward"]
    start: float
    """Seconds since the epoch on the CPU; since `ScheduleClock.begin` on a GPU."""
    end: float


_KINDS: dict[str, Literal["forward", "backward"]] = {"forward-compute": "forward", "backward-compute": "backward"}


class ScheduleClock:
    """Stands in for Megatron's `config.timers` while a step is recorded. Other timers than those of tasks do nothing.

    On a GPU the times are CUDA events, read once at the end: recording does not make the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Literal["forward", "backward"], Any, Any]] = []
        self._name = ""
        self._started: Any = None
        self._origin = self._mark()

    def __call__(self, name: str, log_level: int | None = None) -> "ScheduleClock":
        self._name = name
        return self

    def start(self, barrier: bool = False) -> None:
        if self._name in _KINDS:
            self._started = self._mark()

    def stop(self, barrier: bool = False) -> None:
        kind = _KINDS.get(self._name)
        if kind is not None:
            self._marks.append((kind, self._started, self._mark()))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self) -> list[TaskTime]:
        """All tasks so far. On a GPU this waits for them to finish."""
        if not self._cuda:
            return [TaskTime(*mark) for mark in self._marks]
        torch.cuda.synchronize()
        return [
            TaskTime(kind, self._origin.elapsed_time(start) / 1e3, self._origin.elapsed_time(end) / 1e3)
            for kind, start, end in self._marks
        ]
