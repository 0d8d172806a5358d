"""Assembles the subcommands; expected errors end with one clear message and their own exit code."""

import sys

import typer
from rich.console import Console

from ouro_megatron.errors import OuroError

app = typer.Typer(
    name="ouro",
    help="Train looped language models on Megatron-Core.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point of the `ouro` script."""
    try:
        app()
    except OuroError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        sys.exit(error.exit_code)
