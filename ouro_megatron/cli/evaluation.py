"""`ouro eval`."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ouro_megatron.evaluation.evaluate import Evaluation

Model = Annotated[
    Path, typer.Argument(help="A checkpoint, a run folder (its newest is taken), or an exported or published folder.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the JSON and the picture.")]


def evaluate(
    checkpoint: Model,
    loops: Annotated[int, typer.Option(min=1, help="Loops to run; may be more than were trained.")] = 8,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences.")] = 64,
    data: Annotated[list[Path] | None, typer.Option(help="A .bin/.idx pair instead of the recipe's (repeat).")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file instead of the recipe's data (repeat).")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="The training's when left out.")] = None,
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """What each loop is worth on held-out text: loss, perplexity and bits per byte, accuracy against loops used,
    whether the gate stops where loops do not help, and depth by kind of token.

    Writes evaluation.json and evaluation.png, for a run into its folder evaluation/. Under torchrun the ranks share
    the model.

    Examples:

        ouro eval runs/demo/4-gate

        ouro eval exported/demo --text README.md --loops 6 --out /tmp/evaluation
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from rich.console import Console
    from rich.progress import Progress

    from ouro_megatron.evaluation.evaluate import EvaluationSettings, default_out
    from ouro_megatron.evaluation.evaluate import evaluate as run

    settings = EvaluationSettings(loops, sequences, tuple(data or ()), tuple(text or ()), sequence_length)
    target = out or default_out(checkpoint)
    leads = os.environ.get("RANK", "0") == "0"
    console = Console(highlight=False, soft_wrap=True, quiet=not leads)
    with Progress(console=console, transient=True, disable=not (leads and console.is_terminal)) as bars:
        task = bars.add_task("sequences", total=None)
        found = run(
            checkpoint,
            settings,
            device=device,
            out=target,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    _show(console, found)
    console.print(f"{target / 'evaluation.json'}, {target / 'evaluation.png'}")


def _show(console: "Console", found: "Evaluation") -> None:
    from rich.table import Table

    console.print(
        f"{found.folder}: {found.layers} layers, trained with {found.trained_loops} loops; {found.tokens:,} held-out "
        f"tokens, {found.text_bytes:,} bytes"
    )
    table = Table("loop", "loss (nats)", "perplexity", "bits per byte", "accuracy", "exit probability")
    for row in found.quality:
        exits = f"{row.exit_probability:.3f}" if row.loop <= found.trained_loops else ""
        numbers = (f"{row.loss:.4f}", f"{row.perplexity:.2f}", f"{row.bits_per_byte:.4f}", f"{row.accuracy:.2%}")
        table.add_row(str(row.loop), *numbers, exits)
    console.print(table)
    console.print(f"expected depth {found.expected_depth:.2f}")
    curve = Table("q", "mean loops", "loss (nats)", "accuracy")
    for point in found.curve[::4]:
        curve.add_row(f"{point.q:g}", f"{point.mean_loops:.2f}", f"{point.loss:.4f}", f"{point.accuracy:.2%}")
    console.print(curve)
    gates = Table("gate after loop", "AUC", "calibration error", "helped by the next loop: surest to stop", "to go on")
    for gate in found.gates:
        auc = "-" if gate.auc is None else f"{gate.auc:.3f}"
        gates.add_row(
            str(gate.loop), auc, f"{gate.error:.3f}", f"{gate.bins[-1].helped:.1%}", f"{gate.bins[0].helped:.1%}"
        )
    console.print(gates)
    kinds = Table("token to predict", "tokens", "expected depth", "loss at loop 1", "at the last")
    for kind in found.classes:
        kinds.add_row(
            kind.name,
            f"{kind.tokens:,}",
            f"{kind.expected_depth:.2f}",
            f"{kind.first_loss:.3f}",
            f"{kind.last_loss:.3f}",
        )
    console.print(kinds)
