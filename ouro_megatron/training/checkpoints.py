"""The callback that saves: when due, and when the process is about to leave."""

from collections.abc import Callable
from pathlib import Path

from ouro_megatron.checkpoint.folder import prune
from ouro_megatron.checkpoint.save import PendingSave, begin_save
from ouro_megatron.checkpoint.state import RunState
from ouro_megatron.recipe.schedule import is_due
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.telemetry.text import duration
from ouro_megatron.training.progress import Progress
from ouro_megatron.training.stopping import Stopping
from ouro_megatron.training.trainer import StepOutcome, Trainer


class Checkpoints:
    """Keeps the newest and the permanent checkpoints. With `checkpoint.asynchronous` one may be on its way."""

    def __init__(
        self,
        root: Path,
        describe: Callable[[Trainer], RunState],
        sinks: Sinks | None,
        stopping: Stopping,
        saved: Progress,
    ) -> None:
        self._root = root
        self._describe = describe
        self._sinks = sinks
        self._stopping = stopping
        self._saved = _mark(saved)
        """What the newest checkpoint holds."""
        self._pending: PendingSave | None = None

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if self._pending is not None:
            trainer.engine.position.phase = "asking the ranks about the checkpoint being written"
            if self._pending.is_ready():
                self.settle(trainer)
        if is_due(trainer.recipe.checkpoint.every, outcome.before, outcome.after):
            self._save(trainer)
            if not trainer.recipe.checkpoint.asynchronous:
                self._stopping.poll(trainer)  # a signal during the save: this checkpoint is the last one needed

    def finish(self, trainer: Trainer) -> None:
        self.settle(trainer)
        if self._saved != _mark(trainer.progress):
            self._save(trainer)
            self.settle(trainer)

    def settle(self, trainer: Trainer) -> None:
        """Waits for the save under way, if any, and makes it count. All ranks call it together."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.commit()
            self._committed(trainer, pending)

    def rolled_back(self, trainer: Trainer) -> None:
        """The newest checkpoint is now the one that was just loaded."""
        self._saved = _mark(trainer.progress)

    def _save(self, trainer: Trainer) -> None:
        self.settle(trainer)  # slower than the interval: training waits for it here
        background = trainer.recipe.checkpoint.asynchronous and not trainer.stop_requested and not trainer.is_done
        self._pending = begin_save(trainer.engine, self._root, self._describe(trainer), background=background)
        self._saved = _mark(trainer.progress)
        if not background:
            self.settle(trainer)

    def _committed(self, trainer: Trainer, pending: PendingSave) -> None:
        if trainer.context.rank != 0:
            return
        settings, plan = trainer.recipe.checkpoint, trainer.plan

        def is_permanent(step: int) -> bool:
            return step > 0 and is_due(settings.permanent_every, plan.at(step - 1), plan.at(step))

        deleted = prune(self._root, settings.keep_last, is_permanent)
        if self._sinks is not None:
            beside = f" within {duration(pending.seconds)} beside training" if pending.in_background else ""
            gone = f"; deleted {', '.join(path.name for path in deleted)}" if deleted else ""
            self._sinks.notify("checkpoint", f"saved {pending.folder}{beside}{gone}")


def _mark(progress: Progress) -> tuple[int, bool]:
    return progress.step, progress.pending_evaluation
