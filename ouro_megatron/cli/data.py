"""`ouro data`: prepare, verify, describe and show training data."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ouro_megatron.cli.packing import pack_report

data = typer.Typer(help="Prepare, verify, describe and show training data.", no_args_is_help=True)

Prefixes = Annotated[list[Path], typer.Argument(help="Path of a .bin/.idx pair without the suffix.")]


class _Bars:
    """Progress bars in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console = console
        self._progress = progress
        self._task = None if progress is None else progress.add_task("")

    def begin(self, what: str, total: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, description=what, total=total or None)
        else:
            self._console.print(what)

    def advance(self, amount: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def say(self, line: str) -> None:
        self._console.print(line)


@data.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="Data recipe (YAML).", show_default=False)],
    workers: Annotated[
        int, typer.Option(min=1, help="Tokenising processes; one a core when left out.", show_default=False)
    ] = os.cpu_count() or 1,
    force: Annotated[bool, typer.Option("--force", help="Make everything again.")] = False,
) -> None:
    """Turn raw text into a tokenizer and .bin/.idx pairs. Skips what is up to date, goes on after a kill.

    Example:

        ouro data prepare stages/demo/data.yaml
    """
    from data_prep.prepare import load_data_recipe
    from data_prep.prepare import prepare as run

    settings = load_data_recipe(recipe)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        run(settings, _Bars(console, None), workers=workers, force=force)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        run(settings, _Bars(console, progress), workers=workers, force=force)


@data.command()
def verify(prefixes: Prefixes) -> None:
    """Read all of each pair and compare it with its index and manifest.

    Example:

        ouro data verify data/demo/code data/demo/prose
    """
    from data_prep.verify import verify as check

    for prefix in prefixes:
        typer.echo(check(prefix))


@data.command()
def stats(prefixes: Prefixes) -> None:
    """Documents, tokens, lengths and unigram entropy of each pair.

    Example:

        ouro data stats data/demo/code data/demo/prose
    """
    from rich.table import Table

    from data_prep.verify import stats as describe

    table = Table("data", "documents", "tokens", "shortest", "median", "longest", "ids used", "unigram entropy (nats)")
    for prefix in prefixes:
        found = describe(prefix)
        numbers = (found.documents, found.tokens, found.shortest, found.median, found.longest, found.used_ids)
        table.add_row(str(prefix), *(f"{number:,}" for number in numbers), f"{found.unigram_entropy:.3f}")
    Console().print(table)


@data.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(help="Path of a .bin/.idx pair without the suffix.")],
    document: Annotated[int, typer.Option(min=0, help="First document to show.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many documents.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder; the manifest's when left out.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids instead of text.")] = False,
) -> None:
    """Show documents as text or ids.

    Example:

        ouro data inspect data/demo/prose --document 3
    """
    from data_prep.verify import documents

    for number, tokens, text in documents(prefix, document, count, tokenizer):
        typer.secho(f"--- document {number}: {len(tokens)} tokens", fg="cyan")
        typer.echo(" ".join(map(str, tokens)) if ids else text)


data.command("pack-report")(pack_report)
