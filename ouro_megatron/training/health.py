"""The callback that looks after the numbers: skipped updates, going back, giving up."""

from collections.abc import Callable

from ouro_megatron.errors import TrainingError
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.records import EventRecord
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.training.rollback import Rollbacks, left_out
from ouro_megatron.training.spikes import SpikeGuard
from ouro_megatron.training.trainer import StepOutcome, Trainer


class Health:
    """Reports skipped updates; after too many in a row goes back (`health.rollback_after`) or ends the run.

    All ranks see the same numbers and decide alike. `settle` must finish a save under way, and `rolled_back` is told
    about the new state.
    """

    def __init__(
        self,
        recipe: Recipe,
        sinks: Sinks | None,
        guard: SpikeGuard,
        rollbacks: Rollbacks,
        settle: Callable[[Trainer], None],
        rolled_back: Callable[[Trainer], None],
    ) -> None:
        self._limit = recipe.training.max_skipped_steps
        self._settings = recipe.health
        self._sinks = sinks
        self._guard = guard
        self._rollbacks = rollbacks
        self._settle = settle
        self._rolled_back = rolled_back

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if not outcome.result.skipped:
            return
        step, row, reason = trainer.progress.step, trainer.progress.skipped_in_a_row, outcome.result.skip_reason
        if self._sinks is not None:
            self._sinks.notify("warning", f"step {step} was skipped: {reason}; the weights were left alone")
        if self._settings.rollback_after is not None and row >= self._settings.rollback_after:
            self._go_back(trainer, reason)
        elif row >= self._limit:
            raise TrainingError(
                f"{row} steps in a row up to step {step} were skipped, the last one because of: {reason} "
                f"(training.max_skipped_steps={self._limit}). The last checkpoint is from before; a lower optimizer.lr,"
                " another batch, or health.rollback_after may help"
            )

    def finish(self, trainer: Trainer) -> None:
        pass

    def _go_back(self, trainer: Trainer, reason: str) -> None:
        progress, row = trainer.progress, trainer.progress.skipped_in_a_row
        done = len(self._rollbacks.entries)
        if done >= self._settings.max_rollbacks:
            raise TrainingError(
                f"{row} updates in a row up to step {progress.step} were skipped ({reason}), after {done} rollbacks "
                f"(health.max_rollbacks={self._settings.max_rollbacks}): going back does not help this run"
            )
        self._settle(trainer)
        plan, left = trainer.plan, progress.step
        state = self._rollbacks.go_back(
            trainer.context,
            from_step=left,
            until=left - row,
            data_position=lambda step: trainer.data.position(plan.at(step).consumed_samples),
            reason=reason,
        )
        progress.take(state)
        progress.skipped_in_a_row = 0  # the steps that were skipped before this checkpoint led nowhere either
        self._guard.restore(state.health.get("window", {}))
        trainer.data.leave_out(left_out(self._rollbacks.entries))
        self._rolled_back(trainer)
        if self._sinks is not None:
            entry = self._rollbacks.entries[-1]
            message = (
                f"{row} updates in a row up to step {left} were skipped: back at step {entry.to_step}; samples "
                f"{entry.start} to {entry.end} are left out from here on ({reason})"
            )
            self._sinks.write(EventRecord(step=entry.to_step, name="rollback", message=message))
