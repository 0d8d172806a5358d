"""The looped pipeline against what a Megatron user would run today, and weak scaling: real training steps on CPU ranks.

    python -m benchmarks.pipeline                  # both tables
    python -m benchmarks.pipeline --only scaling

Alternatives, with the same arithmetic in the layers and one whole step each (forward, backward, reduction, Adam):

    looped      L layers over p ranks, T loops interleaved (this project)
    unrolled    plain 1F1B, the unrolled loop as one chunk a rank: each holds all L layers and runs T / p loops of them;
                layer gradients are summed over the pipeline, as Megatron sums those of a tied embedding
    distinct    plain 1F1B over T x L distinct layers

All compute a loss after the last loop; `looped` also computes those of the T - 1 others, at a vocabulary so small that
they hardly count. Two ranks on two cores show the wall clock. Four ranks share the cores: an idle rank's core serves
another, so their wall clock shows work, not waiting; for them the processor time of all ranks is printed. How long four
ranks wait for each other is what benchmarks/bubble.py measures.

Weak scaling keeps each rank's work and counts against the cores: with 2 cores, 4 ranks can at best do the work of 2.
"""

import argparse
import os
import resource
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ModelSection, ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.ranks import run_ranks

MODEL = ModelSection(layers=4, hidden=256, heads=4, ffn=704, vocab=512, loops=4)
SEQUENCE, MICROBATCHES = 128, 8


@dataclass(frozen=True)
class Case:
    """One kind of training on so many ranks."""

    system: str
    pipeline: int = 1
    data: int = 1
    layers: int = MODEL.layers

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data


@dataclass(frozen=True)
class Measured:
    """Of one rank."""

    seconds: float
    """Median of a step."""
    cpu_seconds: float
    """The process's processor time in a step."""
    parameters: int
    mib: float
    """Growth of the peak of resident memory over what the process held before."""


class RepeatedLayers(LoopLM):
    """A rank's share of the unrolled loop: one visit runs its layers several times."""

    times = 1

    def run_layers(self, h_sbh: Tensor, rotary: Tensor, loop: int = 0, documents: object = None) -> Tensor:
        for _ in range(self.times):
            h_sbh = super().run_layers(h_sbh, rotary, loop=loop)
        return h_sbh


def train(case: Case, steps: int) -> Measured:
    """Runs on every rank: `steps` training steps after one to warm up."""
    context = create_context(ParallelSection(pipeline=case.pipeline))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        engine = _engine(case, context)
        torch.manual_seed(context.data_rank)
        tokens = torch.randint(0, MODEL.vocab, (MICROBATCHES, 1, SEQUENCE + 1))
        batches = [Microbatch(row[:, :-1], row[:, 1:], torch.ones(1, SEQUENCE)) for row in tokens]
        seconds, cpu = [], []
        for _ in range(1 + steps):
            context.barrier()
            wall, work = time.perf_counter(), time.process_time()
            means = engine.accumulate(batches)
            if case.system == "unrolled":
                _sum_over_pipeline(engine, context)
            engine.update(means, 1e-3)
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - work)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(parameter.numel() for parameter in engine.lm.parameters())
        return Measured(statistics.median(seconds[1:]), statistics.median(cpu[1:]), count, (peak - before) / 1024)
    finally:
        context.close()


def _engine(case: Case, context: ParallelContext) -> Engine:
    loops, kind = MODEL.loops, LoopLM
    if case.system == "looped":
        model = MODEL.model_copy(update={"layers": case.layers})
    elif case.system == "distinct":
        model, loops = MODEL.model_copy(update={"layers": case.layers * loops, "loops": 1}), 1
    else:
        model = MODEL.model_copy(update={"layers": case.layers * case.pipeline, "loops": 1})
        loops, kind = 1, RepeatedLayers
    even = [model.layers // case.pipeline] * case.pipeline
    lm = kind(model, context, layers_by_rank=even)
    if isinstance(lm, RepeatedLayers):
        lm.times = MODEL.loops // case.pipeline
    initialise(lm, 0)
    engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=loops)
    engine.adopt_weights()
    return engine


def _sum_over_pipeline(engine: Engine, context: ParallelContext) -> None:
    """The layers are the same on every pipeline rank, so their gradients are added up."""
    for parameter in engine.lm.decoder.layers.parameters():
        dist.all_reduce(parameter.main_grad, group=context.groups.pp)


def compare(steps: int, rounds: int) -> Table:
    table = Table(
        title=f"L={MODEL.layers}, T={MODEL.loops}, m={MICROBATCHES}, hidden {MODEL.hidden}, {SEQUENCE} tokens"
    )
    for name in ("p", "system", "s/step", "x looped", "CPU s/step", "x looped", "params/rank", "MiB/rank"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for pipeline in (2, 4):
        base: tuple[float, float] | None = None
        for system in ("looped", "unrolled", "distinct"):
            runs = [run_ranks(train, pipeline, Case(system, pipeline=pipeline), steps) for _ in range(rounds)]
            wall = statistics.median(max(rank.seconds for rank in ranks) for ranks in runs)
            cpu = statistics.median(sum(rank.cpu_seconds for rank in ranks) for ranks in runs)
            base = base or (wall, cpu)
            shown = f"{wall:.2f}" if pipeline <= _cores() else f"({wall:.2f})"
            table.add_row(
                str(pipeline),
                system,
                shown,
                f"{wall / base[0]:.2f}" if pipeline <= _cores() else "",
                f"{cpu:.2f}",
                f"{cpu / base[1]:.2f}",
                f"{max(rank.parameters for rank in runs[-1]) / 1e6:.2f} M",
                f"{statistics.median(max(rank.mib for rank in ranks) for ranks in runs):.0f}",
            )
    return table


def scaling(steps: int, rounds: int) -> Table:
    table = Table(title=f"Weak scaling on {_cores()} cores: each rank's work is the same")
    for name in ("ranks", "layout", "tokens/s", "x 1 rank", "ideal", "efficiency"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    cases = [Case("looped"), Case("looped", data=2), Case("looped", data=4)]
    cases += [Case("looped", pipeline=2, layers=2 * MODEL.layers), Case("looped", pipeline=4, layers=4 * MODEL.layers)]
    alone = 0.0
    for case in cases:
        runs = [run_ranks(train, case.ranks, case, steps) for _ in range(rounds)]
        seconds = statistics.median(max(rank.seconds for rank in ranks) for ranks in runs)
        # A pipeline of p ranks takes p times the layers through the same tokens: counted in tokens a rank.
        work = case.ranks * MICROBATCHES * SEQUENCE / seconds
        alone = alone or work
        ideal = min(case.ranks, _cores())
        layout = f"DP {case.data}" if case.pipeline == 1 else f"PP {case.pipeline}, {case.layers} layers"
        cells = (
            str(case.ranks),
            layout,
            f"{work:.0f}",
            f"{work / alone:.2f}",
            str(ideal),
            f"{work / alone / ideal:.0%}",
        )
        table.add_row(*cells)
    return table


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["systems", "scaling"])
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case")
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.only != "scaling":
        console.print(compare(arguments.steps, arguments.rounds))
    if arguments.only != "systems":
        console.print(scaling(arguments.steps, arguments.rounds))


if __name__ == "__main__":
    main()
