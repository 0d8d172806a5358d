"""What happens around a training step: health, checkpoints, evaluation, stopping, records."""

from collections.abc import Callable
from pathlib import Path

from ouro_megatron.checkpoint.folder import prune
from ouro_megatron.checkpoint.save import save
from ouro_megatron.checkpoint.state import RunState
from ouro_megatron.data.sampler import MicrobatchReader
from ouro_megatron.errors import TrainingError
from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.recipe.schedule import is_due
from ouro_megatron.telemetry.records import EvalRecord, LoopStats, StepRecord
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.trainer import StepOutcome, Trainer, read


def loop_stats(means: LoopMeans) -> LoopStats:
    return LoopStats(means.ce, means.exit_probability, means.entropy, means.expected_depth)


class Records:
    """Writes a record of every step; only rank 0 has sinks. A change of the loops between steps is an event."""

    def __init__(self, sinks: Sinks | None, flops_per_token: Callable[[int], float], peak_flops: float | None) -> None:
        """`flops_per_token`: of training with so many loops."""
        self._sinks = sinks
        self._flops = flops_per_token
        self._loops: int | None = None
        self._peak = peak_flops

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if self._sinks is None:
            return
        means, rate, loops = outcome.result.means, outcome.before.tokens / outcome.seconds, trainer.engine.loops
        if self._loops not in (None, loops):
            self._sinks.notify("loops", f"{self._loops} -> {loops} loops from step {trainer.progress.step} on")
        self._loops = loops
        mfu = None if self._peak is None else rate * self._flops(loops) / (self._peak * trainer.context.world_size)
        self._sinks.write(
            StepRecord(
                step=trainer.progress.step,
                total_steps=trainer.plan.total_steps,
                tokens=outcome.after.consumed_tokens,
                total_tokens=trainer.plan.total_tokens,
                loss=means.loss,
                loops=loop_stats(means),
                grad_norm=outcome.result.grad_norm,
                lr=outcome.lr,
                global_tokens=outcome.before.tokens,
                seconds=outcome.seconds,
                tokens_per_second=rate,
                mfu=mfu,
                skipped=outcome.result.skipped,
                skipped_steps=trainer.progress.skipped_steps,
            )
        )

    def finish(self, trainer: Trainer) -> None:
        pass


class Health:
    """Reports skipped steps and gives up after too many in a row."""

    def __init__(self, limit: int, sinks: Sinks | None) -> None:
        self._limit = limit
        self._sinks = sinks

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if not outcome.result.skipped:
            return
        step, row = trainer.progress.step, trainer.progress.skipped_in_a_row
        what = f"loss {outcome.result.means.loss:g}, gradient norm {outcome.result.grad_norm:g}"
        if self._sinks is not None:
            self._sinks.notify("warning", f"step {step} was skipped: {what}; the weights were left alone")
        if row >= self._limit:
            raise TrainingError(
                f"{row} steps in a row up to step {step} were not finite ({what}; training.max_skipped_steps="
                f"{self._limit}). The last checkpoint is from before; a lower optimizer.lr or another batch may help"
            )

    def finish(self, trainer: Trainer) -> None:
        pass


class Evaluation:
    """Held-out loss by loop, when due and at the stage's end."""

    def __init__(self, reader: MicrobatchReader | None, sinks: Sinks | None) -> None:
        self._reader = reader
        self._sinks = sinks
        self._last_step = -1

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if self._reader is not None and (
            is_due(trainer.recipe.evaluation.every, outcome.before, outcome.after) or trainer.is_done
        ):
            self._evaluate(trainer, self._reader)

    def finish(self, trainer: Trainer) -> None:
        pass

    def _evaluate(self, trainer: Trainer, reader: MicrobatchReader) -> None:
        samples = trainer.plan.at(0).samples
        batches = trainer.recipe.evaluation.batches
        means = evaluate_batches(trainer, reader, samples, batches)
        if self._sinks is not None:
            after = trainer.plan.at(trainer.progress.step)
            self._sinks.write(
                EvalRecord(
                    step=after.step,
                    tokens=after.consumed_tokens,
                    loss=means.loss,
                    loops=loop_stats(means),
                    batches=batches,
                )
            )


def evaluate_batches(trainer: Trainer, reader: MicrobatchReader, samples: int, batches: int) -> LoopMeans:
    """Means over `batches` global batches of `samples` sequences, always the first ones. All ranks call it."""
    engine = trainer.engine
    sums = engine.evaluate(list(read(reader, 0, samples)))
    for index in range(1, batches):
        sums = sums + engine.evaluate(list(read(reader, index * samples, samples)))
    return sums.means()


class Checkpoints:
    """Saves when due and when the process is about to leave; keeps the newest and the permanent ones."""

    def __init__(self, root: Path, describe: Callable[[Trainer], RunState], sinks: Sinks | None) -> None:
        self._root = root
        self._describe = describe
        self._sinks = sinks
        self._saved_step: int | None = None

    def start(self, trainer: Trainer) -> None:
        self._saved_step = trainer.progress.step or None

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if is_due(trainer.recipe.checkpoint.every, outcome.before, outcome.after):
            self._save(trainer)

    def finish(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.progress.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        folder = save(trainer.engine, self._root, self._describe(trainer))
        self._saved_step = trainer.progress.step
        if trainer.context.rank != 0:
            return
        settings, plan = trainer.recipe.checkpoint, trainer.plan

        def is_permanent(step: int) -> bool:
            return step > 0 and is_due(settings.permanent_every, plan.at(step - 1), plan.at(step))

        deleted = prune(self._root, settings.keep_last, is_permanent)
        if self._sinks is not None:
            gone = f"; deleted {', '.join(path.name for path in deleted)}" if deleted else ""
            self._sinks.notify("checkpoint", f"saved {folder}{gone}")


class Stopping:
    """Ends the loop after the current step when any rank was told to stop."""

    def __init__(self, signals: StopSignals, sinks: Sinks | None) -> None:
        self._signals = signals
        self._sinks = sinks

    def start(self, trainer: Trainer) -> None:
        self._check(trainer)

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        self._check(trainer)

    def finish(self, trainer: Trainer) -> None:
        pass

    def _check(self, trainer: Trainer) -> None:
        trainer.engine.position.phase = "asking the ranks about stop signals"
        if trainer.context.any_rank(self._signals.received is not None):
            trainer.stop_requested = True
            if self._sinks is not None and not trainer.is_done:
                name = self._signals.received or "a signal to another rank"
                self._sinks.notify("stop", f"stopping after step {trainer.progress.step}: {name}")
