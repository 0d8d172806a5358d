"""When a rank's forward and backward tasks ran, recorded through the timers that Megatron's schedules call."""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from ouro_megatron.parallel.position import Position


class TaskTime(NamedTuple):
    """One task of the schedule on this rank, in the order in which tasks ran."""

    kind: Literal["forward", "backward"]
    start: float
    """Seconds since the ScheduleClock was made."""
    end: float


_KINDS: dict[str, Literal["forward", "backward"]] = {"forward-compute": "forward", "backward-compute": "backward"}


class ScheduleClock:
    """Stands in for Megatron's `config.timers` during a step. Other timers than those of tasks do nothing.

    On a GPU the times are CUDA events, read once at the end: recording does not make the host wait. A `position` is
    kept up to date as tasks begin and end, so that others can see where this rank is.
    """

    def __init__(self, device: torch.device, position: Position | None = None) -> None:
        self._position = position
        self._backward_place: Callable[[int], tuple[int, int]] = lambda index: (0, index + 1)
        self._backwards = 0
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Literal["forward", "backward"], Any, Any]] = []
        self._name = ""
        self._started: Any = None
        self._origin = self._mark()

    def __call__(self, name: str, log_level: int | None = None) -> "ScheduleClock":
        self._name = name
        return self

    def follow(self, backward_place: Callable[[int], tuple[int, int]]) -> None:
        """`backward_place`: loop (0: all) and microbatch, both from 1, of this rank's n-th backward task, from 0."""
        self._backward_place, self._backwards = backward_place, 0

    def start(self, barrier: bool = False) -> None:
        kind = _KINDS.get(self._name)
        if kind is None:
            return
        if self._position is not None:
            if kind == "backward":
                self._position.loop, self._position.microbatch = self._backward_place(self._backwards)
                self._backwards += 1
            self._position.task = kind
        self._started = self._mark()

    def stop(self, barrier: bool = False) -> None:
        kind = _KINDS.get(self._name)
        if kind is not None:
            self._marks.append((kind, self._started, self._mark()))
            if self._position is not None:
                self._position.task = "after forward" if kind == "forward" else "after backward"

    def _mark(self) -> Any:
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def busy_seconds(self) -> float:
        """Seconds inside tasks. On a GPU only once the host has waited for the last one, as reading a result does."""
        if self._cuda:
            return sum(start.elapsed_time(end) for _, start, end in self._marks) / 1e3
        return sum(end - start for _, start, end in self._marks)

    def times(self) -> list[TaskTime]:
        """All tasks so far. On a GPU this waits for them to finish."""
        if not self._cuda:
            return [TaskTime(kind, start - self._origin, end - self._origin) for kind, start, end in self._marks]
        torch.cuda.synchronize()
        return [
            TaskTime(kind, self._origin.elapsed_time(start) / 1e3, self._origin.elapsed_time(end) / 1e3)
            for kind, start, end in self._marks
        ]
