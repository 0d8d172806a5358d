"""The training loop: small on purpose. What happens around a step is the business of callbacks."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ouro_megatron.errors import TrainingError
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.schedule import BatchPlan, BatchPoint, LoopPlan, LRSchedule
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.records import RankSpread
from ouro_megatron.training.data_stream import DataStream
from ouro_megatron.training.engine import Engine, Judge, StepResult
from ouro_megatron.training.progress import Progress


@dataclass(frozen=True)
class StepOutcome:
    """What callbacks are told after a step. The same on every rank, except the seconds."""

    before: BatchPoint
    after: BatchPoint
    result: StepResult
    lr: float
    seconds: float
    busy_seconds: float
    """This rank's part of `seconds` that was not waiting for other pipeline or data-parallel ranks."""


class Callback(Protocol):
    """Called on every rank in the same order, so a callback may talk to the other ranks."""

    def start(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer", outcome: StepOutcome) -> None: ...

    def finish(self, trainer: "Trainer") -> None:
        """After the last step of this process: at the stage's end, or when it was told to stop."""


class Trainer:
    """Runs the steps that are left. `stop_requested` may be set by a callback: the loop ends after that step."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        data: DataStream,
        plan: BatchPlan,
        progress: Progress,
        callbacks: Sequence[Callback],
        judge: Judge | None = None,
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.plan = plan
        self.progress = progress
        self.stop_requested = False
        self.spread: RankSpread | None = None
        """Of the last step over all ranks; None for a single one."""
        self.data = data
        self._judge = judge
        self._lr = LRSchedule(recipe, plan)
        self._loops = LoopPlan(recipe, plan)
        self._callbacks = callbacks

    @property
    def context(self) -> ParallelContext:
        return self.engine.context

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self.plan.total_steps

    def fit(self) -> None:
        """Trains to the end of the stage or to a stop. All ranks call it together.

        Raises TrainingError naming rank, stage, step, loop and microbatch when communication with another rank fails.
        """
        with naming_the_place(self.engine):
            self.engine.set_loops(self._loops.at(max(0, self.progress.step - 1)))  # an evaluation may be made up for
            for callback in self._callbacks:
                callback.start(self)
            while not self.is_done and not self.stop_requested:
                outcome = self._step()
                for callback in self._callbacks:
                    callback.after_step(self, outcome)
                    if self.progress.step != outcome.after.step:  # rolled back: that step is no longer part of the run
                        break
            for callback in self._callbacks:
                callback.finish(self)

    def _step(self) -> StepOutcome:
        progress, position = self.progress, self.engine.position
        started = time.perf_counter()
        before = self.plan.at(progress.step)
        self.engine.set_loops(self._loops.at(progress.step))
        position.step = progress.step + 1
        position.enter("reading data")
        batches = self.data.step(before)
        read = time.perf_counter() - started
        lr = self._lr.at(progress.step)
        result = self.engine.train_step(batches, lr, self._judge)
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.seconds += seconds
        if result.skipped:
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
        else:
            progress.optimizer_steps += 1
            progress.skipped_in_a_row = 0
        busy = read + self.engine.busy_seconds
        return StepOutcome(before, self.plan.at(progress.step), result, lr, seconds, busy)


@contextmanager
def naming_the_place(engine: Engine) -> Iterator[None]:
    """Turns errors of torch and Megatron inside the block into a TrainingError that says who was doing what."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(f"{engine.context.describe_rank()} failed in {engine.position}: {first_line}") from error
