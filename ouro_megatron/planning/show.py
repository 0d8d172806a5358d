"""A plan as tables for the terminal, and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ouro_megatron.planning.hardware import GIB
from ouro_megatron.planning.plan import RESERVE_BYTES, Plan
from ouro_megatron.telemetry.text import big, duration

_NARROW: dict[str, Any] = {"padding": (0, 0), "collapse_padding": True}
"""Many columns on a terminal of 80."""


def show_plan(plan: Plan, console: Console) -> None:
    """Prints layout, memory by pipeline rank, where time goes, and the stage's length and price in GPU-hours."""
    layout = plan.layout
    console.print(
        f"[bold]{layout.world} x {plan.gpu.name}[/]: {layout.describe()}, layers by rank {list(layout.layers)}, "
        f"{layout.microbatches} microbatches of {layout.microbatch} x {layout.sequence} tokens, "
        f"recompute {layout.recompute}" + (f" in loops 1-{layout.recompute_loops}" if layout.recompute_loops else "")
    )
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    console.print(_speed_line(plan))
    console.print(f"Limit: {plan.limit()}.")
    console.print(
        "[dim]Speeds: datasheets and what an H200 reached; links between GPUs are assumed. Bytes are counted.[/]"
    )


def _memory_table(plan: Plan) -> Table:
    title = f"Memory, GiB of {plan.gpu.memory_bytes / GIB:.1f} ({RESERVE_BYTES / GIB:.1f} kept free)"
    table = Table(title=title, **_NARROW)
    columns = (
        "rank",
        "params",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "visits",
        "head",
        "working",
        "peak",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for rank, memory in enumerate(plan.memory):
        fits = memory.peak + RESERVE_BYTES <= plan.gpu.memory_bytes
        table.add_row(
            str(rank),
            big(memory.parameters),
            *(f"{part / GIB:.2f}" for part in (memory.weights, memory.gradients, memory.optimizer)),
            f"{memory.activations / GIB:.2f}",
            str(memory.visits_in_flight),
            *(f"{part / GIB:.2f}" for part in (memory.head, memory.working)),
            f"{memory.peak / GIB:.2f}" + ("" if fits else " [red]too much[/]"),
        )
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title=f"One step: {plan.step_seconds:.3f} s, {big(plan.layout.step_tokens)} tokens")
    for name in ("part", "share"):
        table.add_column(name, justify="right" if name == "share" else "left")
    for name, share in plan.shares().items():
        if share > 0:
            table.add_row(name, f"{share:.1%}")
    for where, in_node in (("inside its node", True), ("between nodes", False)):
        parts = [traffic.by_purpose(in_node=in_node) for traffic in plan.traffic]
        most = max(parts, key=lambda amounts: sum(amounts.values()))
        table.add_section()
        table.add_row(f"sent by a GPU {where}", f"{sum(most.values()) / 1e9:.2f} GB")
        for name, amount in most.items():
            table.add_row(f"  {name}", f"{amount / 1e9:.2f} GB")
    return table


def _speed_line(plan: Plan) -> str:
    return (
        f"{plan.flops_per_token / 1e9:.1f} GFLOP a token, bubble {plan.bubble:.1%}, "
        f"[bold]{big(plan.tokens_per_second)} tokens/s, MFU {plan.mfu:.1%}[/]; "
        f"{_length(plan)}."
    )


def _length(plan: Plan) -> str:
    if plan.total_tokens is None or plan.days is None or plan.gpu_hours is None:
        return "how long the stage takes depends on data.train, which was not read: budget.epochs counts its tokens"
    return f"{big(plan.total_tokens)} tokens take {duration(plan.days * 86_400)}, {big(plan.gpu_hours)} GPU-hours"


def show_search(plans: list[Plan], console: Console, rows: int) -> None:
    """Prints the best layouts, fastest first; batch is sequences a microbatch, m microbatches, red does not fit."""
    fitting = sum(plan.fits for plan in plans)
    title = f"{len(plans)} layouts can run, {fitting} fit into memory; the first {min(rows, len(plans))}"
    table = Table(title=title, **_NARROW)
    for name in ("TP·CP·PP·DP", "batch", "m", "recompute", "s/step", "tok/s", "MFU", "bubble", "GiB", "days"):
        table.add_column(name, justify="left" if name == "recompute" else "right", no_wrap=True)
    for plan in plans[:rows]:
        layout = plan.layout
        memory = f"{plan.peak_bytes / GIB:.1f}" if plan.fits else f"[red]{plan.peak_bytes / GIB:.1f}![/]"
        table.add_row(
            "·".join(str(size) for size in (layout.tensor, layout.context, layout.pipeline, layout.data)),
            str(layout.microbatch),
            str(layout.microbatches),
            layout.recompute,
            f"{plan.step_seconds:.3f}",
            big(plan.tokens_per_second),
            f"{plan.mfu:.1%}",
            f"{plan.bubble:.1%}",
            memory,
            "" if plan.days is None else f"{plan.days:.1f}",
        )
    console.print(table)
    if fitting:
        best = plans[0].layout
        console.print(
            f"Best: parallel.tensor={best.tensor} parallel.context={best.context} parallel.pipeline={best.pipeline} "
            f"parallel.sequence={str(best.sequence_parallel).lower()} batch.microbatch={best.microbatch} "
            f"training.recompute={best.recompute}",
            markup=False,
        )
    else:
        console.print(f"None fits. The smallest: {plans[0].limit()}.")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan."""
    layout = plan.layout
    return {
        "gpu": plan.gpu.name,
        "world": layout.world,
        "tensor": layout.tensor,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "sequence_parallel": layout.sequence_parallel,
        "layers": list(layout.layers),
        "microbatch": layout.microbatch,
        "microbatches": layout.microbatches,
        "recompute": layout.recompute,
        "recompute_loops": layout.recompute_loops,
        "fits": plan.fits,
        "memory": [{**vars(memory), "peak": memory.peak} for memory in plan.memory],
        "step_seconds": plan.step_seconds,
        "shares": plan.shares(),
        "bubble": plan.bubble,
        "flops_per_token": plan.flops_per_token,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "traffic": [vars(traffic) for traffic in plan.traffic],
        "limit": plan.limit(),
    }
