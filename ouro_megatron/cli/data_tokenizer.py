"""`ouro data check-tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def check_tokenizer(
    tokenizer: Annotated[Path, typer.Argument(help="Tokenizer folder.", show_default=False)],
    paths: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.", show_default=False)],
    limit: Annotated[float | None, typer.Option(min=0, help="Stop after this many MB.", show_default=False)] = None,
) -> None:
    """Compare the fast tokenising path with `tokenizers` on your own text, id by id.

    Example:

        ouro data check-tokenizer data/demo/tokenizer /usr/share/doc --limit 20
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from data_prep.check_tokenizer import check_tokenizer as check

    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("comparing ids"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        most = None if limit is None else int(limit * 1e6)
        line = check(tokenizer, paths, lambda done, total: progress.update(task, completed=done, total=total), most)
    console.print(line)
