"""Peak memory of a rank against the plan: real training steps in processes of their own.

    python -m benchmarks.memory                     # CPU ranks: one to four processes a layout
    python -m benchmarks.memory --device cuda       # one GPU: the layouts of one rank, at GPU size
    python -m benchmarks.memory --only pp2 dp2      # the layouts whose name contains "pp2" or "dp2"
    python -m benchmarks.memory --json memory.json  # the table as a file, too

Each rank warms up on a small model, so that libraries have loaded what they load, then notes what it holds, builds the
model and its optimizer, trains two steps and notes the most it has held: on a CPU the process's resident memory from
the kernel (VmHWM, reset before), with every allocation of 64 KiB or more returned to the kernel when it is freed; on a
GPU what torch's allocator gave out. The plan says `peak`, without the reserve for what no plan counts.
"""

import argparse
import gc
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.memory import RankMemory, rank_memory
from ouro_megatron.recipe.layers import balanced_layers
from ouro_megatron.recipe.schema import ModelSection, ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.ranks import run_ranks

MIB = 2**20
SMALL = ModelSection(layers=6, hidden=256, heads=4, ffn=704, vocab=4096, loops=4, rope_base=1e6)
LARGE = ModelSection(layers=12, hidden=2048, heads=16, ffn=5632, vocab=49_152, loops=4, rope_base=1e6)


@dataclass(frozen=True)
class Measured:
    """One pipeline rank of one layout."""

    layout: str
    pipeline_rank: int
    predicted: float
    """Bytes."""
    measured: float
    """Bytes; the most of the ranks at this pipeline position."""
    parts: dict[str, float]
    """The prediction's."""

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


def layout_on(device: str, **changes: object) -> Layout:
    """A layout of the benchmark's model for a device, on one rank unless `changes` say otherwise."""
    model = LARGE if device == "cuda" else SMALL
    model = model.model_copy(update={"loops": changes.pop("loops", model.loops)})
    plain = Layout(
        model=model,
        sequence=4096 if device == "cuda" else 512,
        microbatch=1,
        microbatches=1,
        tensor=1,
        pipeline=1,
        data=1,
        sequence_parallel=False,
        layers=(),
        recompute="none",
        recompute_loops=None,
        bytes_per_value=2 if device == "cuda" else 4,
        chunk_tokens=1024 if device == "cuda" else 128,
        on_gpu=device == "cuda",
    )
    changed = replace(plain, **changes)  # type: ignore[arg-type]
    return replace(changed, layers=changed.layers or tuple(balanced_layers(model, changed.pipeline, changed.sequence)))


def layouts(device: str) -> dict[str, Layout]:
    """By name. On a GPU those of one rank."""
    one = {
        "t1": layout_on(device, loops=1),
        "t4": layout_on(device),
        "t4-selective": layout_on(device, recompute="selective"),
        "t4-full": layout_on(device, recompute="full"),
        "t4-full-in-2-loops": layout_on(device, recompute="full", recompute_loops=2),
        "t4-grouped-heads": layout_on(device),
    }
    grouped = one["t4-grouped-heads"]
    model = grouped.model.model_copy(update={"kv_heads": grouped.model.heads // 4})
    one["t4-grouped-heads"] = replace(grouped, model=model)
    if device == "cuda":
        return one | {"t4-gate": layout_on(device, trains_model=False)}
    return one | {
        "t4-bf16": layout_on(device, bytes_per_value=2),
        "dp2-t4": layout_on(device, data=2),
        "tp2-t4": layout_on(device, tensor=2),
        "tp2-sp-t4": layout_on(device, tensor=2, sequence_parallel=True),
        "tp2-sp-t4-full": layout_on(device, tensor=2, sequence_parallel=True, recompute="full"),
        "pp2-t1": layout_on(device, pipeline=2, loops=1, microbatches=4),
        "pp2-t4": layout_on(device, pipeline=2, microbatches=4),
        "pp2-t4-selective": layout_on(device, pipeline=2, microbatches=4, recompute="selective"),
        "pp2-t4-full": layout_on(device, pipeline=2, microbatches=4, recompute="full"),
        "pp2-tp2-sp-t4": layout_on(device, pipeline=2, tensor=2, sequence_parallel=True, microbatches=4),
        "cp2-t4": layout_on(device, context=2, sequence=1024),
        "cp2-t4-full": layout_on(device, context=2, sequence=1024, recompute="full"),
        "cp2-pp2-t4": layout_on(device, context=2, sequence=1024, pipeline=2, microbatches=4),
    }


def step_engine(layout: Layout, context: ParallelContext) -> Engine:
    """The engine of a rank of `layout`, with weights."""
    lm = LoopLM(
        layout.model,
        context,
        dtype=torch.bfloat16 if layout.bytes_per_value == 2 else torch.float32,
        recompute=layout.recompute,
        recompute_loops=layout.recompute_loops,
        layers_by_rank=layout.layers,
    )
    initialise(lm, 0)
    objective = ObjectiveSection(
        kind="expected_loss" if layout.trains_model else "gate", chunk_tokens=layout.chunk_tokens
    )
    engine = Engine(lm, context, objective, OptimizerSection(lr=1e-3), loops=layout.loops)
    engine.adopt_weights()
    return engine


def train(layout: Layout, context: ParallelContext, steps: int = 2) -> None:
    """Builds a model and trains it on random tokens; Adam's moments are there from the end of the first step on."""
    engine = step_engine(layout, context)
    generator = torch.Generator().manual_seed(context.data_rank)
    shape = (layout.microbatch, layout.sequence)
    for _ in range(steps):
        batches = []
        for _ in range(layout.microbatches):
            tokens_bs = torch.randint(0, layout.model.vocab, shape, generator=generator).to(context.device)
            batches.append(Microbatch(tokens_bs, tokens_bs.roll(-1, 1), torch.ones(shape, device=context.device)))
        engine.train_step(batches, 1e-3)


def parallel_section(layout: Layout) -> ParallelSection:
    return ParallelSection(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        sequence=layout.sequence_parallel,
    )


def peak(layout: Layout, device: str) -> tuple[int, int]:
    """Runs on every rank: (its pipeline position, bytes that training held at most beyond what was there before)."""
    context = create_context(parallel_section(layout), device)
    try:
        small = layout.model.model_copy(update={"hidden": 64 * layout.model.heads, "ffn": 128, "vocab": 256})
        train(replace(layout, model=small, sequence=64 * 2 * layout.context), context, steps=1)
        gc.collect()
        if not context.platform.is_cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train(layout, context)
            return context.pipeline_rank, torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _of_process("VmRSS")
        train(layout, context)
        return context.pipeline_rank, _of_process("VmHWM") - before
    finally:
        context.close()


def _of_process(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure(name: str, layout: Layout, device: str) -> list[Measured]:
    """By pipeline rank."""
    found: dict[int, int] = {}
    for rank, size in run_ranks(peak, layout.world, layout, device, timeout=400.0, forked=device == "cpu"):
        found[rank] = max(size, found.get(rank, 0))
    rows = []
    for rank, size in sorted(found.items()):
        memory = rank_memory(layout, rank)
        rows.append(Measured(name, rank, memory.peak, size, parts(memory)))
    return rows


def parts(memory: RankMemory) -> dict[str, float]:
    return {name: value for name, value in vars(memory).items() if name not in ("parameters", "visits_in_flight")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="parts of the names of the layouts")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()
    # Read by the C library when the ranks' processes start.
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(64 * 1024), MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    known = layouts(arguments.device)
    chosen = {name: layout for name, layout in known.items() if any(part in name for part in arguments.only)}
    if not chosen:
        sys.exit(f"no layout is called {' or '.join(arguments.only)}; there are {', '.join(known)}")
    table = Table(title=f"peak of a rank on {arguments.device}, MiB")
    for column in ("layout", "pipeline rank", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    rows = []
    for name, layout in chosen.items():
        for row in measure(name, layout, arguments.device):
            rows.append(row)
            numbers = (f"{row.predicted / MIB:.1f}", f"{row.measured / MIB:.1f}", f"{row.ratio:.3f}")
            table.add_row(name, str(row.pipeline_rank), *numbers)
            print(f"{name} {row.pipeline_rank}: {' '.join(numbers)}", file=sys.stderr, flush=True)
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
