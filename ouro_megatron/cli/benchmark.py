"""`ouro benchmark`."""

import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ouro_megatron.cli.evaluation import Device, Model


def benchmark(
    checkpoint: Model,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness (repeat).")] = None,
    suite: Annotated[
        str | None, typer.Option(help="A ready list of tasks with shots: ouro-base, or a YAML file like it.")
    ] = None,
    exit_policy: Annotated[
        list[str] | None,
        typer.Option("--exit", help="all, step=2, q=0.8, change=0.1 or expected (repeat to compare)."),
    ] = None,
    loops: Annotated[int | None, typer.Option(min=1, help="Loops at most; the training's when left out.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples shown; as the task says when left out.")] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="Folder with task files of your own (repeat).", exists=True)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task, for a quick look.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at one time.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of question and answer; the training's sequences when left out.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Allow tasks that run code the model wrote. Use a sandbox.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for benchmark.json and benchmark.png.")] = None,
    device: Device = "cpu",
) -> None:
    """Benchmarks of lm-evaluation-harness at chosen exits.

    Needs pip install 'ouro-megatron[eval]'. The harness fetches a task's data from the Hugging Face hub.

    Examples:

        ouro benchmark runs/demo/4-gate --task arc_easy --exit all --exit step=1 --exit q=0.7

        ouro benchmark exported/demo --suite ouro-base --allow-code --out runs/benchmark
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from rich.console import Console
    from rich.table import Table

    from ouro_megatron.evaluation.benchmark import BenchmarkSettings, TaskChoice, read_suite, run_benchmark

    tasks = [TaskChoice(name, shots) for name in task or []] + (read_suite(suite) if suite else [])
    settings = BenchmarkSettings(
        tasks,
        tuple(exit_policy or ["all"]),
        loops,
        tuple(include or ()),
        limit,
        batch,
        max_length,
        allow_code,
    )
    results = run_benchmark(checkpoint, settings, device=device, out=out)
    console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")
    table = Table("task", "exit", "metric", "value", "± stderr", "asked", "mean loops")
    for row in results:
        stderr = "" if row.stderr is None else f"{row.stderr:.4f}"
        table.add_row(
            row.task, row.exit, row.metric, f"{row.value:.4f}", stderr, str(row.samples), f"{row.mean_loops:.2f}"
        )
    console.print(table)
    if out is not None:
        console.print(f"{out / 'benchmark.json'}, {out / 'benchmark.png'}")
