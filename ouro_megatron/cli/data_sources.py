"""`ouro data sources`, `fixtures`, `preview`, `index`: what can be read, and what is done before the work."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SHOWN = 1200
"""Characters of a document that are shown."""


def sources(
    kind: Annotated[str | None, typer.Argument(help="Show this kind's fields.", show_default=False)] = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the recipe to begin with.")] = False,
) -> None:
    """List the corpora and formats that can be read; with a kind, its fields.

    Examples:

        ouro data sources

        ouro data sources nemotron_cc

        ouro data sources nemotron_cc --recipe > nemotron-cc.yaml
    """
    from rich.padding import Padding
    from rich.table import Table

    from data_prep.sources.catalogue import all_kinds, find_kind, recipe_text

    console = Console(highlight=False)
    if kind is None:
        table = Table("kind", "reads", box=None, pad_edge=False)
        for entry in all_kinds():
            table.add_row(f"[cyan]{entry.name}[/]", escape(entry.about.split(". ")[0].rstrip(".")))
        console.print(table)
        console.print("\nFields of one: ouro data sources KIND. A small corpus of it: ouro data fixtures KIND FOLDER")
        return
    if recipe:
        typer.echo(recipe_text(kind), nl=False)
        return
    found = find_kind(kind)
    console.print(f"[cyan]{found.name}[/]: {escape(found.about)}\n")
    for setting in found.settings:
        default = (
            ""
            if setting.default == "none"
            else ", required"
            if setting.default == "required"
            else f", default {setting.default}"
        )
        console.print(f"[bold]{setting.name}[/] [dim]({escape(setting.type + default)})[/]")
        console.print(Padding(escape(setting.meaning), (0, 0, 0, 4)))
    if found.recipe is not None:
        console.print(f"\nA recipe to begin with: ouro data sources {found.name} --recipe")


def fixtures(
    kind: Annotated[str, typer.Argument(help="Kind of source, or `all`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
) -> None:
    """Write a small made-up corpus in the exact shape of a real one, with a recipe that prepares it.

    Example:

        ouro data fixtures nemotron_cc /tmp/cc && ouro data prepare /tmp/cc/data.yaml
    """
    from data_prep.fixtures import write_fixtures

    for recipe in write_fixtures(kind, out):
        typer.echo(f"{recipe.parent}: written. Next: ouro data prepare {recipe}")


def preview(
    recipe: Annotated[Path, typer.Argument(help="Data recipe (YAML).", show_default=False)],
    source: Annotated[str | None, typer.Option(help="One source; all when left out.", show_default=False)] = None,
    count: Annotated[int, typer.Option(min=0, help="Documents of each source to show.")] = 2,
) -> None:
    """Check a recipe's sources and show their first documents, without tokenising anything.

    Example:

        ouro data preview stages/demo/data.yaml --count 1
    """
    from data_prep.prepare import load_data_recipe
    from data_prep.preview import preview as look

    console = Console(highlight=False, soft_wrap=True)
    for found in look(load_data_recipe(recipe), source, count):
        units = f"{found.units:,} unit{'s' if found.units != 1 else ''} in {found.files:,} file(s)"
        console.print(f"[bold cyan]{found.name}[/] ({found.kind}): {units}, {found.bytes / 1e6:,.1f} MB")
        for number, document in enumerate(found.documents):
            fields = ", ".join(f"{name}={value!r}" for name, value in document.fields.items())[:200]
            console.print(f"[dim]--- document {number}, key {escape(repr(document.key[:80]))} {escape(fields)}[/]")
            if document.messages is None:
                console.print(escape(document.text[:_SHOWN]))
            for turn in document.messages or ():
                console.print(f"[green]{escape(str(turn['role']))}:[/] {escape(str(turn['content'])[:_SHOWN])}")
        for fault in found.faults[:10]:
            console.print(f"[red]{escape(f'{fault.path}, {fault.where}: {fault.reason}')}[/]")


class _Bar:
    """A progress bar in a terminal, lines elsewhere."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self._console, self._progress = console, progress
        self._task = None if progress is None else progress.add_task("", total=None)

    def begin(self, what: str, total: int) -> None:
        from data_prep.display import shown_bytes

        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, description=what, total=total)
        else:
            self._console.print(f"{what}: {shown_bytes(total)} to read")

    def reached(self, done: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def say(self, line: str) -> None:
        self._console.print(line)


def index(
    recipe: Annotated[Path, typer.Argument(help="Data recipe (YAML).", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Small streams too.")] = False,
) -> None:
    """Note places where large gzip streams can be entered, so that many workers can read one.

    Needed once for MAP-CC, whose families are single streams of up to 1.4 TB; useful for any .jsonl.gz that is larger
    than a shard. A run that was killed goes on.

    Example:

        ouro data index map-cc.yaml
    """
    from data_prep.index_streams import index_streams
    from data_prep.prepare import load_data_recipe

    settings = load_data_recipe(recipe)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        index_streams(settings, _Bar(console, None), everything=everything)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        index_streams(settings, _Bar(console, progress), everything=everything)
