"""The callback that ends the loop when any rank was told to stop."""

from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.spread import ask_ranks
from ouro_megatron.training.trainer import StepOutcome, Trainer


class Stopping:
    """Asks all ranks together, so that all save the same step. Long work between steps polls it too."""

    def __init__(self, signals: StopSignals, sinks: Sinks | None) -> None:
        self._signals = signals
        self._sinks = sinks

    def start(self, trainer: Trainer) -> None:
        self.poll(trainer)

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        """Comes first after a step: the ranks' spread travels with the question, and the step's record wants it."""
        trainer.engine.position.phase = "asking the ranks about stop signals"
        stop, spread = ask_ranks(trainer.context, self._signals.received is not None, outcome.busy_seconds)
        trainer.spread = spread if trainer.context.world_size > 1 else None
        if stop:
            self._stop(trainer)

    def finish(self, trainer: Trainer) -> None:
        pass

    def poll(self, trainer: Trainer) -> bool:
        """Whether the run should save and leave now. All ranks call it together and get the same answer."""
        if trainer.stop_requested:
            return True
        trainer.engine.position.phase = "asking the ranks about stop signals"
        if trainer.context.any_rank(self._signals.received is not None):
            self._stop(trainer)
        return trainer.stop_requested

    def _stop(self, trainer: Trainer) -> None:
        trainer.stop_requested = True
        if self._sinks is not None:
            name = self._signals.received or "a signal to another rank"
            self._sinks.notify("stop", f"stopping after step {trainer.progress.step}: {name}")
