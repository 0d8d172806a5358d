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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try the layout of --world ranks on shapes alone, and print the plan.")
    ] = False,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks of the dry run.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU the dry run's plan is for: a100, h100, h200 or b200.")] = "h100",
    no_data: Annotated[bool, typer.Option("--no-data", help="The dry run leaves the data unread.")] = False,
) -> None:
    """Train one stage; start it again to go on where it left off.

    Saves and leaves with exit code 75 on TERM, USR1 or Ctrl-C. Under torchrun or srun each task is one rank.

    Examples:

        ouro train stages/demo/1-stable.yaml

        ouro train stages/demo/1-stable.yaml parallel.tensor=1 parallel.pipeline=1 --nproc 2

        ouro train my-stage.yaml --dry-run --world 1024

        torchrun --nproc-per-node 4 --no-python ouro train stages/demo/1-stable.yaml
    """
    from ouro_megatron.recipe.load import load_recipe
    from ouro_megatron.training.launch import train as launch

    loaded = load_recipe(recipe, overrides or [])
    if dry_run or world is not None:
        from ouro_megatron.training.dry_run import check_dry_run_options
        from ouro_megatron.training.dry_run import dry_run as try_layout

        try_layout(loaded, check_dry_run_options(world, nproc), gpu=gpu, data=not no_data)
        raise typer.Exit
    raise typer.Exit(launch(loaded, nproc))
