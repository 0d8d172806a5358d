"""What happens around the steps, one small class each: records and evaluation.

Health, stopping and saving have files of their own: `health.py`, `stopping.py`, `checkpoints.py`.
"""

from collections.abc import Callable

from ouro_megatron.data.sampler import MicrobatchReader
from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.recipe.schedule import is_due
from ouro_megatron.telemetry.records import EvalRecord, LoopStats, StepRecord
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.telemetry.system import system_numbers
from ouro_megatron.training.data_stream import read
from ouro_megatron.training.rollback import Rollbacks
from ouro_megatron.training.stopping import Stopping
from ouro_megatron.training.trainer import StepOutcome, Trainer


def loop_stats(means: LoopMeans) -> LoopStats:
    return LoopStats(means.ce, means.exit_probability, means.entropy, means.expected_depth)


class Records:
    """Writes a record of every step; only rank 0 has sinks. A change of the loops between steps is an event."""

    def __init__(
        self,
        sinks: Sinks | None,
        flops_per_token: Callable[[int], float],
        peak_flops: float | None,
        rollbacks: Rollbacks,
    ) -> None:
        """`flops_per_token`: of training with so many loops."""
        self._sinks = sinks
        self._flops = flops_per_token
        self._loops: int | None = None
        self._peak = peak_flops
        self._rollbacks = rollbacks
        self._counted_to = 0
        self._consumed: dict[str, int] = {}

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
                skip_reason=outcome.result.skip_reason,
                rollbacks=len(self._rollbacks.entries),
                ranks=trainer.spread,
                source_share=self._source_share(trainer, outcome.after.consumed_samples),
                system=system_numbers(trainer.recipe.run_folder, trainer.context.platform.memory_in_use()),
            )
        )

    def finish(self, trainer: Trainer) -> None:
        pass

    def _source_share(self, trainer: Trainer, consumed: int) -> dict[str, float]:
        """Share of this stage's tokens by source so far. After a rollback all are counted again."""
        if consumed < self._counted_to:
            self._counted_to, self._consumed = 0, {}
        for name, count in trainer.data.source_counts(self._counted_to, consumed - self._counted_to).items():
            self._consumed[name] = self._consumed.get(name, 0) + count
        self._counted_to = consumed
        total = sum(self._consumed.values())
        return {name: count / total for name, count in self._consumed.items()} if total else {}


class Evaluation:
    """Held-out loss by loop, when due and at the stage's end. A stop interrupts it; it is made up for on resuming."""

    def __init__(self, reader: MicrobatchReader | None, sinks: Sinks | None, stopping: Stopping) -> None:
        self._reader = reader
        self._sinks = sinks
        self._stopping = stopping

    def start(self, trainer: Trainer) -> None:
        if trainer.progress.pending_evaluation and self._reader is not None:
            self._evaluate(trainer, self._reader)

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        trainer.progress.pending_evaluation = False
        if self._reader is not None and (
            is_due(trainer.recipe.evaluation.every, outcome.before, outcome.after) or trainer.is_done
        ):
            self._evaluate(trainer, self._reader)

    def finish(self, trainer: Trainer) -> None:
        pass

    def _evaluate(self, trainer: Trainer, reader: MicrobatchReader) -> None:
        samples = trainer.plan.at(0).samples
        batches = trainer.recipe.evaluation.batches
        means = None
        if not trainer.stop_requested:
            means = evaluate_batches(trainer, reader, samples, batches, self._stopping)
        trainer.progress.pending_evaluation = means is None
        if self._sinks is not None and means is not None:
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


def evaluate_batches(
    trainer: Trainer, reader: MicrobatchReader, samples: int, batches: int, stopping: Stopping
) -> LoopMeans | None:
    """Means over `batches` global batches of `samples` sequences, always the first ones; None when told to stop.

    All ranks call it.
    """
    engine = trainer.engine
    sums = engine.evaluate(list(read(reader, 0, samples)))
    for index in range(1, batches):
        if stopping.poll(trainer):
            return None
        sums = sums + engine.evaluate(list(read(reader, index * samples, samples)))
    return sums.means()
