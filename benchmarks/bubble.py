"""The looped pipeline's bubble: Megatron's real schedule and messages on CPU ranks against the simulation.

    python -m benchmarks.bubble [--out FOLDER]

Computing is stood in for by sleeping, so that four ranks on two cores do not wait for each other's processor: what is
measured is the schedule, its messages and Python's part. Forward sleeps 20 ms, backward 40 ms, whatever the rank.
Beside it, with the same work a rank, in the same run: plain 1F1B over the unrolled loop or over T x L distinct layers,
each rank one chunk of T L / p layers. These two have the same schedule; they differ in memory and in what is reduced
(benchmarks/pipeline.py).
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ouro_megatron.model.config import transformer_config
from ouro_megatron.parallel.context import create_context
from ouro_megatron.parallel.loop_pipeline import LoopPipeline, LoopView
from ouro_megatron.parallel.schedule_clock import ScheduleClock
from ouro_megatron.planning.measured import measured_timeline
from ouro_megatron.planning.schedule import Task, Timeline, simulate
from ouro_megatron.planning.timeline import draw, write_trace
from ouro_megatron.recipe.schema import ModelSection, ParallelSection
from tests.distributed.ranks import run_ranks

FORWARD, BACKWARD = 0.020, 0.040
HIDDEN, SEQUENCE = 64, 32


class _Sleep(torch.autograd.Function):
    """A layer that takes its time and changes nothing."""

    @staticmethod
    def forward(ctx: Any, h_sbh: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return h_sbh * 1.0

    @staticmethod
    def backward(ctx: Any, d_sbh: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return d_sbh * 1.0, None, None


def steps(loops: int, microbatches: int, work: float, repeats: int) -> list[list[tuple[str, float, float]]]:
    """Runs on every rank of a pipeline: the tasks of `repeats` steps after one to warm up. `work` scales a visit."""
    pipeline = int(os.environ["WORLD_SIZE"])
    context = create_context(ParallelSection(pipeline=pipeline))
    model = ModelSection(layers=pipeline, hidden=HIDDEN, heads=2, ffn=64, vocab=64, loops=loops)
    config = transformer_config(model, ParallelSection(pipeline=pipeline), dtype=torch.float32, device=context.device)
    looped = LoopPipeline(config, context, loops)

    def forward(batches: Iterator[Any], view: LoopView) -> tuple[torch.Tensor, Any]:
        next(batches)
        h_sbh = view.received
        if h_sbh is None:
            h_sbh = torch.zeros(SEQUENCE, 1, HIDDEN, requires_grad=True)
        h_sbh = _Sleep.apply(h_sbh, FORWARD * work, BACKWARD * work)
        if context.is_last_stage and view.loops[-1] + 1 == loops:
            return h_sbh.sum(), lambda loss: (loss, torch.tensor(1), None)
        return h_sbh, None

    try:
        recorded: list[list[tuple[str, float, float]]] = []
        for _ in range(1 + repeats):
            context.barrier()
            clock = ScheduleClock(context.device)
            looped.run(forward, list(range(microbatches)), sequence_length=SEQUENCE, microbatch_size=1, clock=clock)
            recorded.append([(task.kind, task.start, task.end) for task in clock.times()])
        return recorded[1:]
    finally:
        context.close()


def compare(pipeline: int, loops: int, microbatches: int, repeats: int) -> tuple[float, float, float, Timeline]:
    """Simulated bubble, measured bubble (median), step time of plain 1F1B over this one's, the last timeline."""

    def planned(rank: int, task: Task) -> float:
        return FORWARD if task.kind == "forward" else BACKWARD

    simulated = simulate(pipeline, loops, microbatches, planned).bubble
    looped = _timelines(pipeline, loops, microbatches, 1.0, repeats)
    seconds = statistics.median(timeline.seconds for timeline in looped)
    plain = looped if loops == 1 else _timelines(pipeline, 1, microbatches, float(loops), repeats)
    ratio = statistics.median(timeline.seconds for timeline in plain) / seconds
    return simulated, statistics.median(timeline.bubble for timeline in looped), ratio, looped[-1]


def _timelines(pipeline: int, loops: int, microbatches: int, work: float, repeats: int) -> list[Timeline]:
    ranks = run_ranks(steps, pipeline, loops, microbatches, work, repeats)
    return [measured_timeline(step, loops, microbatches) for step in zip(*ranks, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for a picture and a trace of each measured step")
    arguments = parser.parse_args()
    table = Table(title=f"bubble over the ideal time, medians of {arguments.repeats} steps")
    for name in ("p", "T", "m", "(p-1)/(Tm)", "simulated", "measured", "step: measured / simulated", "1F1B / looped"):
        table.add_column(name, justify="right")
    for pipeline, loops, microbatches in itertools.product((2, 4), (1, 2, 4), (4, 8)):
        simulated, measured, ratio, timeline = compare(pipeline, loops, microbatches, arguments.repeats)
        formula = (pipeline - 1) / (loops * microbatches)
        step = (1 + measured) / (1 + simulated)
        numbers = (f"{number:.3f}" for number in (formula, simulated, measured, step))
        table.add_row(str(pipeline), str(loops), str(microbatches), *numbers, f"{ratio:.2f}")
        if arguments.out is not None:
            name = f"p{pipeline}-t{loops}-m{microbatches}"
            draw(timeline, loops, arguments.out / f"{name}.png", f"measured: p={pipeline}, T={loops}, m={microbatches}")
            write_trace(timeline, arguments.out / f"{name}.json")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
