"""The callback that draws one step of a run as it really went: when each pipeline rank ran which task."""

import torch.distributed as dist

from ouro_megatron.errors import OuroError
from ouro_megatron.parallel.schedule_clock import TaskTime
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.training.trainer import StepOutcome, Trainer


class Timelines:
    """Writes timeline.png and timeline.json after step `logging.timeline_step`, of the pipeline that rank 0 is in.

    Ranks count from their own start of the step; they start it together, as each step ends with a question to all.
    """

    def __init__(self, step: int | None, sinks: Sinks | None) -> None:
        self._step = step
        self._sinks = sinks

    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, outcome: StepOutcome) -> None:
        if trainer.progress.step != self._step:
            return
        trainer.engine.position.phase = "gathering a timeline"
        context, own = trainer.context, trainer.engine.tasks()
        recorded: list[list[TaskTime]] = [own] * context.pipeline_size
        if context.pipeline_size > 1:
            dist.all_gather_object(recorded, own, group=context.groups.pp)
        if self._sinks is not None and recorded[0]:
            self._draw(trainer, recorded, outcome, self._sinks)

    def finish(self, trainer: Trainer) -> None:
        pass

    def _draw(self, trainer: Trainer, recorded: list[list[TaskTime]], outcome: StepOutcome, sinks: Sinks) -> None:
        from ouro_megatron.planning.measured import measured_timeline
        from ouro_megatron.planning.timeline import draw, write_trace

        folder, loops = trainer.recipe.run_folder, trainer.engine.loops
        microbatches = outcome.before.samples // (trainer.recipe.batch.microbatch * trainer.context.data_size)
        title = f"{trainer.recipe.name}, step {trainer.progress.step}, measured: {trainer.context.describe()}"
        try:
            timeline = measured_timeline(recorded, loops, microbatches)
            draw(timeline, loops, folder / "timeline.png", f"{title}, bubble {timeline.bubble:.1%}")
            write_trace(timeline, folder / "timeline.json")
        except (OuroError, ValueError) as error:  # the gate stage, whose schedule has no backward, ends here too
            sinks.notify("warning", f"no timeline of step {trainer.progress.step}: {error}")
            return
        sinks.notify("timeline", f"step {trainer.progress.step}: {folder / 'timeline.png'} and timeline.json")
