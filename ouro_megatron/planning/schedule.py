"""The looped pipeline's schedule, simulated: who does what when, for given durations.

The order of tasks on each rank is Megatron-Core's interleaved 1F1B with one chunk a loop, restated here
so that a plan needs no process group; tests compare it with what the real schedule runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Task(NamedTuple):
    """One visit of one rank's layers by one microbatch."""

    kind: Literal["forward", "backward"]
    loop: int
    """From 0."""
    microbatch: int


class Event(NamedTuple):
    """A task that ran; seconds from the start of the step."""

    rank: int
    task: Task
    start: float
    end: float


Duration = Callable[[int, Task], float]
"""Seconds a task takes on a pipeline rank."""


@dataclass(frozen=True)
class Timeline:
    """A whole step without the optimizer."""

    events: list[Event]
    pipeline: int

    @property
    def seconds(self) -> float:
        return max(event.end for event in self.events)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes."""
        return sum(event.end - event.start for event in self.events if event.rank == rank)

    @property
    def ideal(self) -> float:
        """Seconds of the busiest rank's work: no schedule can be faster."""
        return max(self.busy(rank) for rank in range(self.pipeline))

    @property
    def bubble(self) -> float:
        """Time lost to waiting as a fraction of the ideal time; (p-1)/(T m) when all ranks do equal work."""
        return self.seconds / self.ideal - 1.0


def rank_order(pipeline: int, rank: int, loops: int, microbatches: int) -> list[Task]:
    """The tasks of one rank in order. With a pipeline and several loops, `microbatches` is a multiple of `pipeline`."""
    if pipeline == 1:
        return [task for index in range(microbatches) for task in _round_trip(index, loops)]
    if loops == 1:
        warmup = min(pipeline - rank - 1, microbatches)
        forward = [(0, index) for index in range(microbatches)]
        backward = forward
    else:
        total = loops * microbatches
        warmup = min((pipeline - rank - 1) * 2 + (loops - 1) * pipeline, total)
        forward = [
            (loop, index)
            for first in range(0, microbatches, pipeline)
            for loop in range(loops)
            for index in range(first, first + pipeline)
        ]
        backward = [(loops - 1 - loop, index) for loop, index in forward]
    forwards = [Task("forward", *place) for place in forward]
    backwards = [Task("backward", *place) for place in backward]
    order = forwards[:warmup]
    for position in range(warmup, len(forwards)):
        order += [forwards[position], backwards[position - warmup]]
    return order + backwards[len(forwards) - warmup :]


def _round_trip(microbatch: int, loops: int) -> list[Task]:
    forwards = [Task("forward", loop, microbatch) for loop in range(loops)]
    return forwards + [Task("backward", loop, microbatch) for loop in reversed(range(loops))]


def needs(task: Task, rank: int, pipeline: int, loops: int) -> tuple[int, Task] | None:
    """The rank and task whose result must have arrived before; None when only this rank's own past matters."""
    kind, loop, microbatch = task
    if kind == "forward":
        if rank > 0:
            return rank - 1, task
        return (pipeline - 1, Task("forward", loop - 1, microbatch)) if loop > 0 else None
    if rank < pipeline - 1:
        return rank + 1, task
    if loop < loops - 1:
        return 0, Task("backward", loop + 1, microbatch)
    return rank, Task("forward", loop, microbatch)


def simulate(pipeline: int, loops: int, microbatches: int, duration: Duration, hop_seconds: float = 0.0) -> Timeline:
    """Runs every rank's tasks in order, each as soon as what it needs has arrived (`hop_seconds` after it was made).

    Raises RuntimeError when the orders of the ranks wait for each other.
    """
    orders = [rank_order(pipeline, rank, loops, microbatches) for rank in range(pipeline)]
    done: dict[tuple[int, Task], float] = {}
    free, position = [0.0] * pipeline, [0] * pipeline
    events: list[Event] = []
    left = sum(len(order) for order in orders)
    while left:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                task = order[position[rank]]
                source = needs(task, rank, pipeline, loops)
                if source is not None and source not in done:
                    break
                arrival = 0.0 if source is None else done[source] + (hop_seconds if source[0] != rank else 0.0)
                start = max(free[rank], arrival)
                end = start + duration(rank, task)
                free[rank] = done[rank, task] = end
                events.append(Event(rank, task, start, end))
                position[rank] += 1
                left -= 1
                moved = True
        if not moved:
            raise RuntimeError(f"the schedule waits for itself: pipeline {pipeline}, loops {loops}, m {microbatches}")
    return Timeline(events, pipeline)


def most_held(pipeline: int, rank: int, loops: int, microbatches: int, weight: Callable[[int], float]) -> float:
    """The largest sum of `weight(loop)` over the visits whose activations a rank holds at one time."""
    weights = [weight(loop) for loop in range(loops)]
    held = most = 0.0
    for kind, loop, _ in rank_order(pipeline, rank, loops, microbatches):
        held += weights[loop] if kind == "forward" else -weights[loop]
        most = max(most, held)
    return most


def most_in_flight(pipeline: int, rank: int, loops: int, microbatches: int) -> int:
    """The largest number of visits whose activations a rank holds at one time."""
    return int(most_held(pipeline, rank, loops, microbatches, lambda loop: 1.0))
