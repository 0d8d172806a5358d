"""`ouro experiment`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ouro_megatron.experiments.cells import Cell
    from ouro_megatron.experiments.plan import Sweep

Name = Annotated[
    str,
    typer.Argument(help="addition, phop, mano, multihop, capo, prior; or summary.", show_default=False),
]


def experiment(
    name: Name,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, on top of the settings.", show_default=False)
    ] = None,
    scale: Annotated[str, typer.Option(help="tiny, small, paper, or a settings file (.yaml).")] = "tiny",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each cell; the settings' when left out.")] = None,
    cells: Annotated[list[str] | None, typer.Option(help="Only these: 2x4, 2x4/VARIANT or VARIANT (repeat).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the experiment; runs/experiments/NAME-SCALE.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at one time on this machine.")] = 1,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks that train each cell; the fewest it needs.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all recipes and show the cells; train none.")
    ] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the cells as a job array instead.")] = False,
    gpus: Annotated[int, typer.Option(min=0, help="With --slurm: GPUs, and ranks, of a cell.")] = 0,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="With --slurm.")] = 4,
    max_running: Annotated[int | None, typer.Option(min=1, help="With --slurm: cells at one time.")] = None,
    partition: Annotated[str | None, typer.Option(help="With --slurm.")] = None,
    account: Annotated[str | None, typer.Option(help="With --slurm.")] = None,
    time: Annotated[str | None, typer.Option(help="With --slurm: time limit of a cell's task.")] = None,
    memory: Annotated[str | None, typer.Option(help="With --slurm: of a cell's task, such as 8G.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="With --slurm: another option of sbatch (repeat).")] = None,
) -> None:
    """Reproduce one of the talk's controlled experiments: train all its models, measure them, judge the claims.

    Writes summary.md, summary.html and summary.json, learning curves and pictures. Run it again to go on: cells that
    are done stay, others continue from their checkpoints. `ouro experiment summary --out DIR` only writes the
    summary anew.

    Examples:

        ouro experiment mano --scale tiny --jobs 2

        ouro experiment phop --cells 2x1 --cells 2x3 --seeds 1

        ouro experiment mano --scale paper --dry-run

        ouro experiment capo --scale small --slurm --gpus 1 --partition gpu
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from rich.console import Console

    from ouro_megatron.experiments.plan import Sweep, chosen_cells, load_plan, save_plan
    from ouro_megatron.experiments.settings import load_settings

    console = Console(highlight=False, soft_wrap=True)
    if name == "summary":
        _summary_only(console, out)
        return
    settings = load_settings(name, scale, overrides)
    folder = out or Path("runs/experiments") / f"{name}-{Path(scale).stem}"
    sweep = Sweep(name, Path(scale).stem, settings, folder)
    chosen = chosen_cells(sweep, seeds, cells or [])
    _check(sweep, chosen, max(gpus, 1) if slurm else nproc)
    if dry_run and not slurm:
        _show_cells(console, sweep, chosen)
        return
    save_plan(sweep)
    if slurm:
        from ouro_megatron.experiments.slurm import ArrayOptions, submit, submitted

        options = ArrayOptions(max_running, gpus, cpus_per_task, memory, time, partition, account, tuple(sbatch or ()))
        scripts = submit(sweep, chosen, options, dry_run=dry_run)
        for script in scripts:
            console.print(str(script))
        if not dry_run and scripts:
            console.print(f"jobs {', '.join(map(str, submitted(sweep)))}; the last one writes {folder / 'summary.md'}")
        if not scripts:
            _finish(console, load_plan(folder))
        return
    _run_here(console, sweep, chosen, jobs, nproc)


def _check(sweep: "Sweep", cells: list["Cell"], ranks: int | None) -> None:
    """All recipes before anything is trained."""
    from ouro_megatron.recipe.validate import check_recipe, ranks_needed

    for cell in cells:
        recipe = sweep.recipe(cell)
        check_recipe(recipe, ranks or ranks_needed(recipe))


def _show_cells(console: "Console", sweep: "Sweep", cells: list["Cell"]) -> None:
    from rich.table import Table

    from ouro_megatron.experiments.cells import cost
    from ouro_megatron.planning.flops import parameter_counts
    from ouro_megatron.recipe.schedule import BatchPlan
    from ouro_megatron.telemetry.text import big

    console.print(f"{sweep.settings.title} ({sweep.scale}): {len(cells)} runs, in {sweep.out}")
    if sweep.settings.note:
        console.print(sweep.settings.note)
    table = Table("cell", "parameters", "steps", "tokens", "FLOPs", "H100 hours at 30 % of its bf16 peak")
    total = 0.0
    for cell in cells:
        recipe, plan = sweep.recipe(cell), BatchPlan(sweep.recipe(cell))
        work = cost(recipe)
        total += work
        numbers = [big(parameter_counts(recipe.model).total), f"{plan.total_steps:,}", big(plan.total_tokens)]
        table.add_row(cell.name, *numbers, f"{work:.2e}", f"{_h100_hours(work):.2f}")
    console.print(table)
    console.print(f"in all {total:.2e} FLOPs, {_h100_hours(total):.1f} H100 hours at 30 % of the peak")


def _h100_hours(flops: float) -> float:
    from ouro_megatron.planning.hardware import GPUS

    return flops / (0.3 * GPUS["h100"].peak("bf16")) / 3600


def _run_here(console: "Console", sweep: "Sweep", cells: list["Cell"], jobs: int, nproc: int | None) -> None:
    from rich.live import Live
    from rich.text import Text

    from ouro_megatron.experiments.sweep import Workers

    done = sum(sweep.result(cell) is not None for cell in cells)
    console.print(
        f"{sweep.settings.title} ({sweep.scale}): {len(cells)} runs, {done} done before; files in {sweep.out}"
    )
    live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def show(lines: list[str], finished: int) -> None:
        if live is not None:
            live.update(Text("\n".join([f"{finished} of {len(cells)} runs are done", *lines[: jobs + 1]])))

    workers = Workers(sweep, cells, jobs, nproc, lambda text: console.print(text, markup=False), show)
    try:
        if live is not None:
            live.start()
        code = workers.run()
    finally:
        if live is not None:
            live.stop()
        _finish(console, sweep)
    if code:
        console.print("stopped; run it again to go on")
        raise typer.Exit(code)


def _finish(console: "Console", sweep: "Sweep") -> bool:
    """Writes the summary and shows the verdicts; False while no cell is done."""
    from rich.table import Table

    from ouro_megatron.experiments.report import result_table, summarise, write_summary

    summary = summarise(sweep)
    if not summary.results:
        return False
    page = write_summary(summary)
    heads, rows = result_table(summary)
    table = Table(*heads)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for judged in summary.judged:
        style = {"holds": "green", "does not hold": "red"}.get(judged.verdict, "yellow")
        console.print(f"[{style}]{judged.verdict}[/]: ", end="")
        console.print(judged.sentence, markup=False)
    console.print(f"{page}, {page.with_suffix('.html')}")
    return True


def _summary_only(console: "Console", out: Path | None) -> None:
    from ouro_megatron.errors import RecipeError
    from ouro_megatron.experiments.plan import load_plan

    if out is None:
        raise RecipeError("ouro experiment summary needs --out DIR, the experiment's folder")
    if not _finish(console, load_plan(out)):
        raise RecipeError(f"{out}: no cell is done; run the experiment first")
