"""Assembles the subcommands; expected errors end with one clear message and their own exit code."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ouro_megatron.cli.analyse import analyse
from ouro_megatron.cli.benchmark import benchmark
from ouro_megatron.cli.chat import chat
from ouro_megatron.cli.checkpoint import checkpoint
from ouro_megatron.cli.checkpoints import upcycle
from ouro_megatron.cli.cluster import cancel, status, submit
from ouro_megatron.cli.dashboard import dashboard
from ouro_megatron.cli.data import data
from ouro_megatron.cli.doctor import doctor
from ouro_megatron.cli.evaluation import evaluate
from ouro_megatron.cli.exchange import export, import_checkpoint
from ouro_megatron.cli.experiment import experiment
from ouro_megatron.cli.generate import generate
from ouro_megatron.cli.lm_eval import lm_eval
from ouro_megatron.cli.plan import plan
from ouro_megatron.cli.recipe import recipe
from ouro_megatron.cli.report import report
from ouro_megatron.cli.serve import serve
from ouro_megatron.cli.train import train
from ouro_megatron.errors import OuroError
from ouro_megatron.parallel.leaving import leave

app = typer.Typer(
    name="ouro",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ouro_megatron {version('ouro-megatron')}")
        raise typer.Exit()


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train looped language models on Megatron-Core."""


app.command()(train)
app.command()(plan)
app.command()(doctor)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(benchmark)
app.command(
    "lm_eval",
    # Everything goes to the harness as it is; --help is its own behind a word: `ouro lm_eval run --help`.
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(lm_eval)
app.command("eval")(evaluate)
app.command("evaluate", hidden=True)(evaluate)  # the name it had
app.command()(upcycle)
app.command()(export)
app.command("import")(import_checkpoint)
app.command()(report)
app.command()(experiment)
app.command()(dashboard)
app.command()(submit)
app.command()(status)
app.command()(cancel)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(analyse, name="analyse")
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Entry point of the `ouro` script."""
    try:
        app()
    except OuroError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        status: int | str | None = error.exit_code
    except SystemExit as leaving:
        status = leaving.code
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and (isinstance(status, int) or status is None):
        leave(status or 0)  # one rank of several, started by srun or torchrun
    sys.exit(status)
