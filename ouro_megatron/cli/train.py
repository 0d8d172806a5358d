"""`ouro train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file of the stage.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, on top of the file.", show_default=False)
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks to start on this machine; the fewest the layout needs when left out."),
    ] = None,
) -> None:
    """Train one stage; start it again to go on where it left off.

    Saves and leaves with exit code 75 on TERM, USR1 or Ctrl-C. Under torchrun or srun each task is one rank.

    Examples:

        ouro train stages/demo/1-stable.yaml

        ouro train stages/demo/1-stable.yaml parallel.tensor=1 parallel.pipeline=1 --nproc 2

        torchrun --nproc-per-node 4 --no-python ouro train stages/demo/1-stable.yaml
    """
    from ouro_megatron.recipe.load import load_recipe
    from ouro_megatron.training.launch import train as launch

    raise typer.Exit(launch(load_recipe(recipe, overrides or []), nproc))
