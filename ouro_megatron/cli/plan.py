"""`ouro plan`."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file of the stage.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, on top of the file.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    search: Annotated[bool, typer.Option("--search", help="Rank all layouts instead of the recipe's own.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Layouts that --search shows.")] = 15,
    picture: Annotated[Path | None, typer.Option(help="Draw the (best) schedule into this PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write it as a Chrome trace, for ui.perfetto.dev.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Memory, speed, days and GPU-hours of a stage on so many GPUs, and what limits it. Starts nothing.

    Examples:

        ouro plan my-stage.yaml --gpus 64 --gpu h100

        ouro plan my-stage.yaml --gpus 1024 --gpu h200 --search

        ouro plan my-stage.yaml parallel.pipeline=4 --gpus 64 --picture schedule.png --trace schedule.json
    """
    from ouro_megatron.planning.run import PlanRequest, run_plan
    from ouro_megatron.recipe.load import load_recipe

    run_plan(load_recipe(recipe, overrides or []), PlanRequest(gpus, gpu, search, rows, picture, trace, as_json))
