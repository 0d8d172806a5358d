"""How a training step's cost grows with loops, layers, sequence and vocabulary: measured, beside the planner's FLOPs.

    python -m benchmarks.cost_growth --out docs/images/cost-growth.png

One process, one thread. One quantity is varied at a time around a small model. Each point is the median of a few steps
over the median at the first value; the line is the same ratio of `flops_per_token` x tokens.
"""

import argparse
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt

from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.planning.flops import flops_per_token
from ouro_megatron.recipe.schema import ModelSection, ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.telemetry.plot_style import LINE, SECOND, STYLE
from ouro_megatron.training.engine import Engine, Microbatch

MODEL = ModelSection(layers=4, hidden=128, heads=4, ffn=352, vocab=2048, loops=2)
SEQUENCE = 256
VARIED: dict[str, tuple[str, tuple[int, ...]]] = {
    "loops": ("loops T", (1, 2, 4, 8)),
    "layers": ("layers L", (2, 4, 8, 16)),
    "sequence": ("sequence S", (128, 256, 512, 1024, 2048)),
    "vocab": ("vocabulary V", (2048, 8192, 24_576, 49_152)),
}


def step_seconds(context: ParallelContext, model: ModelSection, sequence: int, steps: int) -> float:
    """Median seconds of a whole training step on one sequence."""
    lm = LoopLM(model, context)
    initialise(lm, 0)
    engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=model.loops)
    engine.adopt_weights()
    tokens = torch.randint(0, model.vocab, (1, sequence + 1))
    batch = Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, sequence))
    seconds = []
    for _ in range(1 + steps):
        started = time.perf_counter()
        engine.train_step([batch], 1e-3)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cost-growth.png"))
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    context = create_context(ParallelSection(), "cpu")
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(1, len(VARIED), figsize=(13, 3.2), layout="constrained")
    for (field, (label, values)), axes in zip(VARIED.items(), panels, strict=True):
        seconds, flops = [], []
        for value in values:
            model = MODEL if field == "sequence" else MODEL.model_copy(update={field: value})
            sequence = value if field == "sequence" else SEQUENCE
            seconds.append(step_seconds(context, model, sequence, arguments.steps))
            flops.append(flops_per_token(model, sequence) * sequence)
        measured = [point / seconds[0] for point in seconds]
        predicted = [point / flops[0] for point in flops]
        row = "  ".join(f"{v}: {m:.2f} ({p:.2f})" for v, m, p in zip(values, measured, predicted, strict=True))
        print(f"{label}: measured (by FLOPs) over the first: {row}; first step {seconds[0] * 1e3:.1f} ms", flush=True)
        axes.plot(values, predicted, color=LINE, label="FLOPs")
        axes.plot(values, measured, "o", color=SECOND, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.set_title(label)
        axes.legend()
    panels[0].set_ylabel("step over the first one")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=90)
    context.close()


if __name__ == "__main__":
    main()
