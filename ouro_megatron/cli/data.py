"""`ouro data`: prepare training data, on one machine or many."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ouro_megatron.cli.data_look import blend, inspect, stats, table_console, verify
from ouro_megatron.cli.data_sources import fixtures, index, preview, sources
from ouro_megatron.cli.data_tokenizer import check_tokenizer
from ouro_megatron.cli.packing import pack_report

data = typer.Typer(help="Prepare, verify, describe and show training data.", no_args_is_help=True)

Recipe = Annotated[Path, typer.Argument(help="Data recipe (YAML).", show_default=False)]
Workers = Annotated[int, typer.Option(min=1, help="Processes; one a core when left out.", show_default=False)]
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_SLURM = "Slurm"


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _share(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise typer.BadParameter(f"{text!r} is not i/N with 0 <= i < N, such as 0/8")
    return int(first), int(count)


@data.command()
def prepare(
    recipe: Recipe,
    workers: Workers = _CORES,
    force: Annotated[bool, typer.Option("--force", help="Make everything again.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="i/N", help="Tokenise share i (from 0) of N only; `ouro data merge` after.")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit Slurm jobs for what is missing.", rich_help_panel=_SLURM)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --slurm: write the scripts only.", rich_help_panel=_SLURM)
    ] = False,
    array_tasks: Annotated[int, typer.Option(min=1, help="Tasks of the array.", rich_help_panel=_SLURM)] = 16,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Array tasks at one time.", rich_help_panel=_SLURM)
    ] = None,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Processes a task.", rich_help_panel=_SLURM)] = 8,
    memory: Annotated[
        str | None, typer.Option("--mem", help="Memory a task, such as 64G.", rich_help_panel=_SLURM)
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 12:00:00.", rich_help_panel=_SLURM)] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.", rich_help_panel=_SLURM)] = None,
    account: Annotated[str | None, typer.Option(help="Account.", rich_help_panel=_SLURM)] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Another sbatch option, such as --sbatch=--qos=low; may be repeated.", rich_help_panel=_SLURM
        ),
    ] = None,
) -> None:
    """Turn raw text into a tokenizer and .bin/.idx pairs. Skips what is up to date, goes on after a kill.

    Examples:

        ouro data prepare stages/demo/data.yaml

        ouro data prepare web.yaml --slurm --array-tasks 64 --cpus-per-task 32 --partition cpu --time 12:00:00

        ouro data prepare web.yaml --shard 3/8      (on machine 3 of 0..7; then `ouro data merge web.yaml` on one)
    """
    from data_prep.display import Display
    from data_prep.prepare import load_data_recipe
    from data_prep.prepare import prepare as run
    from data_prep.slurm import SlurmOptions, submit

    settings = load_data_recipe(recipe)
    share = None if shard is None else _share(shard)
    if slurm and (shard is not None or force):
        raise typer.BadParameter("--slurm goes with neither --shard nor --force")
    if dry_run and not slurm:
        raise typer.BadParameter("--dry-run goes with --slurm")
    with Display(_console()) as display:
        if not slurm:
            run(settings, display, workers=workers, force=force, shard=share)
            return
        options = SlurmOptions(
            array_tasks, max_running, cpus_per_task, memory, time, partition, account, tuple(sbatch or ())
        )
        submit(settings, recipe, options, display, dry_run=dry_run)


@data.command()
def merge(recipe: Recipe, workers: Workers = _CORES) -> None:
    """Join shards that `ouro data prepare --shard` made to .bin/.idx pairs.

    Example:

        ouro data merge web.yaml
    """
    from data_prep.display import Display
    from data_prep.prepare import load_data_recipe, merge_all

    settings = load_data_recipe(recipe)
    with Display(_console()) as display:
        merge_all(settings, display, workers=workers)


@data.command()
def plan(recipe: Recipe) -> None:
    """List the input once, so that many `--shard` runs need not do it each. Run it again when files changed.

    Example:

        ouro data plan web.yaml
    """
    from data_prep.plan import list_units, save_units
    from data_prep.prepare import load_data_recipe

    settings = load_data_recipe(recipe)
    units = list_units(settings)
    path = save_units(settings, units)
    for name, found in units.items():
        typer.echo(f"{name}: {len(found):,} units, {sum(unit.size for unit in found) / 1e9:,.3f} GB")
    typer.echo(str(path))


@data.command()
def tokenizer(recipe: Recipe) -> None:
    """Train the tokenizer of a recipe and nothing else.

    Example:

        ouro data tokenizer stages/demo/data.yaml
    """
    from data_prep.display import Display
    from data_prep.plan import list_units
    from data_prep.prepare import load_data_recipe, make_tokenizer

    settings = load_data_recipe(recipe)
    with Display(_console()) as display:
        make_tokenizer(settings, list_units(settings, saved=True), display)


@data.command()
def status(recipe: Recipe) -> None:
    """How far each source is: shards, documents, tokens, faults.

    Example:

        ouro data status web.yaml
    """
    from rich.table import Table

    from data_prep.prepare import load_data_recipe
    from data_prep.status import status as look

    table = Table("source", "state", "shards", "input (GB)", "documents", "tokens", "left out", "faults")
    for found in look(load_data_recipe(recipe)):
        table.add_row(
            found.name,
            found.state,
            f"{found.finished:,} of {found.shards:,}",
            f"{found.input_bytes / 1e9:,.3f}",
            *(f"{number:,}" for number in (found.documents, found.tokens, found.left_out, found.faults)),
        )
    table_console().print(table)


for command in (verify, stats, inspect, blend, sources, fixtures, preview, index):
    data.command()(command)
data.command("check-tokenizer")(check_tokenizer)
data.command("pack-report")(pack_report)
