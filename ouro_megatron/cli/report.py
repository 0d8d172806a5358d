"""`ouro report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the folder of several stages.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; FOLDER/report when left out.")] = None,
) -> None:
    """Write the report of a run: one HTML page and PNG pictures.

    Example:

        ouro report runs/demo
    """
    from ouro_megatron.telemetry.report import write_report

    typer.echo(write_report(folder, out))
