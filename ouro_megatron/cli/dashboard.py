"""`ouro dashboard`."""

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    path: Annotated[Path, typer.Argument(help="A pipeline, a recipe, a run folder, or the folder of several runs.")],
    out: Annotated[Path | None, typer.Option(help="The file; PATH/dashboard.json when left out.")] = None,
    entity: Annotated[str | None, typer.Option(help="W&B user or team; the recipe's when left out.")] = None,
    project: Annotated[str | None, typer.Option(help="W&B project; the recipe's when left out.")] = None,
    push: Annotated[bool, typer.Option("--push", help="Create it on the server: needs a login and a network.")] = False,
) -> None:
    """Write a Weights & Biases workspace with the panels that matter for looped models.

    Examples:

        ouro dashboard runs/demo

        ouro dashboard stages/ouro-2.6b

        ouro dashboard runs/demo --push --entity my-team
    """
    from ouro_megatron.cluster.pipeline import stages_of
    from ouro_megatron.telemetry.dashboard import write_dashboard

    stages = stages_of(path)
    typer.echo(write_dashboard(path, out, entity=entity, project=project, push=push, recipes=stages))
