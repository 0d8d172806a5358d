"""`ouro submit`, `ouro status` and `ouro cancel`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ouro_megatron.cluster.pipeline import Pipeline
    from ouro_megatron.cluster.status import StepStatus

PipelinePath = Annotated[
    Path, typer.Argument(help="Pipeline file, a folder with pipeline.yaml, or one stage's recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.path=value for all recipes; cluster.KEY=VALUE for the cluster.", show_default=False),
]
ClusterFile = Annotated[Path | None, typer.Option(help="Cluster file, instead of the pipeline's.")]
_LONG = 24
"""Details of a step that are longer stand below the table."""
TwinFlag = Annotated[bool, typer.Option("--twin", help="The pipeline's small twin: a rehearsal in minutes.")]


def _load(
    path: Path,
    overrides: list[str] | None,
    cluster: Path | None,
    twin: bool,
    nodes: int | None = None,
    time: str | None = None,
) -> "Pipeline":
    from ouro_megatron.cluster.pipeline import load_pipeline

    return load_pipeline(path, overrides or [], cluster=cluster, twin=twin, nodes=nodes, time=time)


def submit(
    pipeline: PipelinePath,
    overrides: Overrides = None,
    from_step: Annotated[str | None, typer.Option("--from", help="First step: it and all that depend on it.")] = None,
    to_step: Annotated[str | None, typer.Option("--to", help="Last step: it and all it depends on.")] = None,
    cluster: ClusterFile = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of every step, instead of the file's.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of every job, such as 4:00:00.")] = None,
    twin: TwinFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the scripts; submit nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run the steps here, one after the other, no Slurm.")] = False,
) -> None:
    """Submit a pipeline's steps to Slurm, each after those it needs. Finished ones are left out: run it again to go on.

    Examples:

        ouro submit stages/ouro-2.6b --cluster stages/cluster/8xh100.yaml --dry-run

        ouro submit stages/ouro-2.6b --from 2.6b-5-ct-annealing cluster.partition=gpu

        ouro submit my-stage.yaml --nodes 8 --cluster stages/cluster/8xh100.yaml

        ouro submit stages/ouro-1.4b --twin --local
    """
    from ouro_megatron.cluster import submit as jobs
    from ouro_megatron.cluster.script import render

    loaded = _load(pipeline, overrides, cluster, twin, nodes, time)
    wanted, project = jobs.plan(loaded, from_step, to_step), jobs.project_folder()
    if local:
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from ouro_megatron.training.launch import train

        raise typer.Exit(jobs.run_here(loaded, wanted, lambda recipe: train(recipe, None), typer.echo))
    if not dry_run:
        jobs.submit(loaded, wanted, project, typer.echo)
        typer.echo(f"Follow it with: ouro status {pipeline}{' --twin' if twin else ''}")
        return
    for job in wanted.submit:
        typer.secho(f"# {job.slurm_folder / 'job.sbatch'}, after {', '.join(job.needs) or 'nothing'}", bold=True)
        typer.echo(render(job, loaded.cluster, loaded.name, project))
    jobs.check(loaded, wanted, project)
    steps = f"{len(wanted.submit)} {'step' if len(wanted.submit) == 1 else 'steps'} to submit"
    typer.echo(f"# good: {steps}, {len(wanted.finished)} finished, nothing was submitted")


def status(
    pipeline: PipelinePath,
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    twin: TwinFlag = False,
    watch: Annotated[float | None, typer.Option(min=1, help="Look again every so many seconds.")] = None,
) -> None:
    """Show each step of a pipeline: state, job, tokens, loss, time left, restarts.

    Example:

        ouro status stages/ouro-2.6b --watch 60
    """
    import time

    from rich.console import Console

    from ouro_megatron.cluster.status import status as look

    loaded = _load(pipeline, overrides, cluster, twin)
    console = Console(highlight=False)
    while True:
        found = look(loaded)
        if watch is not None and console.is_terminal:
            console.clear()
        _show(console, found)
        if watch is None:
            return
        time.sleep(watch)


def _show(console: "Console", found: "list[StepStatus]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ouro_megatron.telemetry.text import big, duration

    table = Table("step", "after", "state", "job", "tokens", "loss", "time left", "restarts", "saved")
    styles = {"finished": "green", "running": "bold cyan", "failed": "bold red", "cancelled": "yellow"}
    below = []
    for step in found:
        detail = step.detail
        if len(detail) > _LONG:
            below.append(f"{step.name}: {detail}")
            detail = ""
        of = "" if step.total_tokens is None else f"{big(step.tokens)} / {big(step.total_tokens)}"
        table.add_row(
            step.name,
            "\n".join(step.needs),
            f"[{styles.get(step.state, 'default')}]{step.state}[/]" + (f" ({escape(detail)})" if detail else ""),
            str(step.job or ""),
            of,
            "" if step.loss is None else f"{step.loss:.4f}",
            "" if step.eta_seconds is None else duration(step.eta_seconds),
            str(step.restarts or ""),
            "" if step.saved_step is None else f"step {step.saved_step}",
        )
    if not console.is_terminal:  # a file or a pipe: a table that is cut tells nothing
        console = Console(width=max(console.width, 160), highlight=False)
    console.print(table)
    for line in below:
        console.print(line, soft_wrap=True, markup=False)


def cancel(
    pipeline: PipelinePath,
    step: Annotated[list[str] | None, typer.Option(help="Only this step; may be given several times.")] = None,
    cluster: ClusterFile = None,
    twin: TwinFlag = False,
) -> None:
    """Cancel a pipeline's jobs. Stages that run save first; `ouro submit` goes on from there.

    Example:

        ouro cancel stages/ouro-2.6b --step 2.6b-5-ct-annealing
    """
    from ouro_megatron.cluster.submit import cancel as end

    end(_load(pipeline, None, cluster, twin), step or [], typer.echo)
