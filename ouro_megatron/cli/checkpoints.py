"""`ouro upcycle`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ouro_megatron.evaluation.held_out import HeldOut

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its newest is taken).")]


def upcycle(
    checkpoint: Checkpoint,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the new model: a multiple of the old.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    layer_map: Annotated[
        Literal["stack", "interleave"], typer.Option("--map", help="stack: 0 1 0 1; interleave: 0 0 1 1.")
    ] = "stack",
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Carry Adam's moments over.")] = False,
    residual_scale: Annotated[
        float, typer.Option(min=0.0, help="Multiplies what each layer adds: 0.5 when doubling keeps most of the loss.")
    ] = 1.0,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences for the losses.")] = 64,
) -> None:
    """Make a deeper model by using layers more than once; reports the loss before and right after.

    Example:

        ouro upcycle runs/demo/1-stable --layers 8 --map interleave --residual-scale 0.25 --out runs/deep
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.evaluation.upcycled import upcycle_and_compare

    compared = upcycle_and_compare(
        checkpoint,
        out,
        layers,
        layer_map,
        optimizer=optimizer,
        residual_scale=residual_scale,
        sequences=sequences,
    )
    typer.echo(f"{out}: {layers} layers, {layer_map}")
    if compared is None:
        typer.echo("the recipe names no validation data: no losses to compare")
    else:
        _table(list(compared))


def _table(results: "list[HeldOut]") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        about = f"{result.folder}: {result.layers} layers, {result.sequences} held-out sequences"
        console.print(about, soft_wrap=True, highlight=False)
        table = Table("loop", "loss (nats)", "exit probability")
        means = result.means
        for loop, (ce, p) in enumerate(zip(means.ce, means.exit_probability, strict=True), start=1):
            table.add_row(str(loop), f"{ce:.4f}", f"{p:.3f}")
        console.print(table)
        console.print(f"objective {means.loss:.4f}, expected depth {means.expected_depth:.2f}, {means.tokens} tokens")
