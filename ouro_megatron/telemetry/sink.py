"""Where records go. The training loop of rank 0 talks to `Sinks`; each sink looks after its own failures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.records import EventRecord, Record

Notify = Callable[[str, str], None]
"""Called with an event's name and message: how a sink tells the others about itself."""


@dataclass(frozen=True)
class RunInfo:
    """What is known when a stage starts."""

    name: str
    run_folder: Path
    config: dict[str, Any]
    """The resolved recipe as plain values."""
    world: str
    """For people: "4 CPU ranks: TP 2 x PP 2 x DP 1"."""
    parameters: int
    start_step: int
    """Steps already done: 0, or where the checkpoint left off."""
    total_steps: int
    resumed: bool
    pipeline: str = ""
    """What the stage is part of."""
    lineage: Sequence[dict[str, Any]] = ()
    """Stages before this one, first to last."""
    git: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Under which the attempts at this stage are found together."""
        return f"{self.pipeline}/{self.name}" if self.pipeline else self.name


def pipeline_of(recipe: Recipe) -> str:
    """The pipeline that a stage is part of: `logging.wandb.group`, else the last part of `run_dir`."""
    return recipe.logging.wandb.group or recipe.run_dir.resolve().name


class Sink(Protocol):
    """One destination of records. None of the methods may end or stall training because its destination is gone."""

    def start(self, run: RunInfo) -> None: ...

    def write(self, record: Record) -> None: ...

    def close(self, summary: str | None) -> None: ...


class Sinks:
    """Hands everything to each sink in order and closes them in the opposite one.

    Put the sinks that people rely on first: what a later sink has to say about itself (`notify`) is written to
    those that have started.
    """

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._open: list[Sink] = []
        self._step = 0

    def add(self, *sinks: Sink) -> None:
        self._sinks.extend(sinks)

    @property
    def members(self) -> Sequence[Sink]:
        return tuple(self._sinks)

    def start(self, run: RunInfo) -> None:
        self._step = run.start_step
        for sink in self._sinks:
            # Open before start: the first sinks must hear what a failing later one reports about itself.
            self._open.append(sink)
            sink.start(run)

    def write(self, record: Record) -> None:
        self._step = record.step
        for sink in tuple(self._open):
            sink.write(record)

    def notify(self, name: str, message: str) -> None:
        """An event at the current step, for example ("warning", "..."); "warning" is shown as one."""
        self.write(EventRecord(step=self._step, name=name, message=message))

    def last_words(self, message: str) -> None:
        """Leaves a failure in the first sink, the file, from a process that is about to end without closing them."""
        if self._open:
            self._open[0].write(EventRecord(step=self._step, name="failure", message=message))

    def close(self, summary: str | None = None) -> None:
        """Closes all; a second call does nothing. `summary` is shown as the run's last words."""
        while self._open:
            # Still in the list while it closes: no sink may lose what another says on its way out.
            self._open[-1].close(summary)
            self._open.pop()
