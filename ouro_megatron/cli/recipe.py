"""`ouro recipe`: show, check and compare recipes."""

from pathlib import Path
from typing import Annotated

import typer

recipe = typer.Typer(help="Show, check and compare stage recipes.", no_args_is_help=True)


@recipe.command()
def show(
    file: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="One line a value, with the file and line it was set in.")
    ] = False,
) -> None:
    """Print the whole recipe: `extends` merged, overrides applied, defaults filled in.

    Example:

        ouro recipe show stages/demo/3-anneal.yaml optimizer.lr=1e-3 --origin
    """
    from ouro_megatron.recipe.load import dump_recipe, leaves, load_with_origins

    loaded, origins = load_with_origins(file, overrides or [])
    if not origin:
        typer.echo(dump_recipe(loaded), nl=False)
        return
    values = dict(leaves(loaded))
    width = max(len(path) for path in values)
    for path, value in values.items():
        typer.echo(f"{path:<{width}}  {value!s:<24}  {origins.get(path, 'default')}")


@recipe.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Recipe files.")],
    nproc: Annotated[int | None, typer.Option(min=1, help="Check the layout for this many ranks, too.")] = None,
) -> None:
    """Check recipes without running them; every problem is listed.

    Example:

        ouro recipe check stages/demo/*.yaml --nproc 4
    """
    from ouro_megatron.errors import RecipeError
    from ouro_megatron.recipe.load import load_recipe
    from ouro_megatron.recipe.validate import check_recipe

    problems = []
    for file in files:
        try:
            check_recipe(load_recipe(file), nproc)
            typer.echo(f"{file}: good")
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


@recipe.command()
def diff(
    before: Annotated[Path, typer.Argument(help="Recipe file.")],
    after: Annotated[Path, typer.Argument(help="Recipe file.")],
) -> None:
    """List the values that differ between two recipes.

    Example:

        ouro recipe diff stages/demo/1-stable.yaml stages/demo/3-anneal.yaml
    """
    from ouro_megatron.recipe.load import difference, load_recipe

    for path, old, new in difference(load_recipe(before), load_recipe(after)):
        typer.secho(path, bold=True)
        typer.secho(f"  - {old}", fg="red")
        typer.secho(f"  + {new}", fg="green")
