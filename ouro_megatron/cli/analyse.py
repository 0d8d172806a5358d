"""`ouro analyse`: pca, safety, agreement."""

import os
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from ouro_megatron.cli.evaluation import Device, Model

analyse = typer.Typer(help="What happens from loop to loop: states, safety, answers.", no_args_is_help=True)

Loops = Annotated[int, typer.Option(min=1, help="Loops to look at; may be more than were trained.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Prompts at most.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at one time.")]
Folder = Annotated[Path, typer.Option(help="Folder for the JSON and the picture.")]


def _console() -> Console:
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    return Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


@analyse.command()
def pca(
    checkpoint: Model,
    first: Annotated[Path, typer.Argument(help="Prompts: one a line, or .jsonl with `prompt`.")],
    second: Annotated[Path, typer.Argument(help="Prompts to tell apart from them.")],
    out: Folder = Path("analysis"),
    loops: Annotated[int | None, typer.Option(min=1, help="Loops; the training's when left out.")] = None,
    pool: Annotated[Literal["last", "mean"], typer.Option(help="State of the last token, or mean over all.")] = "last",
    limit: Limit = None,
    device: Device = "cpu",
) -> None:
    """Hidden states of two sets of prompts, in the plane of each loop's principal components: how far apart are they?

    Example:

        ouro analyse pca runs/demo/4-gate benign.txt harmful.txt --loops 8 --out runs/analysis
    """
    console = _console()
    from ouro_megatron.evaluation.separation import analyse_separation

    found = analyse_separation(checkpoint, first, second, out, loops=loops, pool=pool, limit=limit, device=device)
    table = Table("loop", "silhouette", "nearest mean right", "variance shown")
    for row in found:
        table.add_row(str(row.loop), f"{row.silhouette:.3f}", f"{row.accuracy:.1%}", f"{sum(row.explained):.1%}")
    console.print(table)
    console.print(f"{out / 'pca.json'}, {out / 'pca.png'}")


@analyse.command()
def safety(
    checkpoint: Model,
    prompts: Annotated[Path, typer.Argument(help="Prompts: one a line, or .jsonl with `prompt`.")],
    judge: Annotated[
        str,
        typer.Option(help="module:function, 'command: PROGRAM', or refusals (built in; it only looks for words)."),
    ] = "refusals",
    out: Folder = Path("analysis"),
    loops: Loops = 8,
    harmful_at: Annotated[float, typer.Option(help="Scores from here on count as harmful.")] = 5.0,
    template: Annotated[str, typer.Option(help="Put round each prompt; \\n is a line break.")] = "{prompt}",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    limit: Limit = None,
    batch: Batch = 8,
    device: Device = "cpu",
) -> None:
    """Answers to your prompts at every depth, scored by your judge.

    A function gets (prompt, answer) and returns a number. A program gets one JSON object a line with prompt, answer and
    loop, and answers each with {"score": number}. Answers are kept: another judge does not generate them again.

    Examples:

        ouro analyse safety runs/demo/4-gate prompts.txt --judge my_judges:harmfulness --out runs/safety

        ouro analyse safety exported/demo prompts.jsonl --judge "command: python judge.py" --loops 8
    """
    console = _console()
    from ouro_megatron.evaluation.safety import analyse_safety

    found = analyse_safety(
        checkpoint,
        prompts,
        out,
        judge=judge,
        loops=loops,
        harmful_at=harmful_at,
        template=template.replace("\\n", "\n"),
        max_tokens=max_tokens,
        limit=limit,
        batch=batch,
        device=device,
        progress=console.print,
    )
    table = Table("loop", "mean score", f"share ≥ {harmful_at:g}", "answers")
    for row in found:
        table.add_row(str(row.loop), f"{row.mean_score:.3f}", f"{row.harmful:.1%}", str(row.answers))
    console.print(table)
    console.print(f"{out / 'safety.json'}, {out / 'safety.png'}")


@analyse.command()
def agreement(
    checkpoint: Model,
    prompts: Annotated[Path, typer.Argument(help="Prompts: one a line, or .jsonl with `prompt` and `choices`.")],
    out: Folder = Path("analysis"),
    loops: Loops = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer without choices.")] = 32,
    limit: Limit = None,
    batch: Batch = 8,
    device: Device = "cpu",
) -> None:
    """Which loops give the same answers: the likeliest of a prompt's choices, or greedy text.

    Example:

        ouro analyse agreement runs/demo/4-gate questions.jsonl --loops 8 --out runs/analysis
    """
    console = _console()
    from ouro_megatron.evaluation.agreement import analyse_agreement

    found = analyse_agreement(
        checkpoint,
        prompts,
        out,
        loops=loops,
        max_tokens=max_tokens,
        limit=limit,
        batch=batch,
        device=device,
        progress=console.print,
    )
    table = Table("loop", *(str(loop + 1) for loop in range(len(found.matrix))))
    for loop, row in enumerate(found.matrix, start=1):
        table.add_row(str(loop), *(f"{100 * value:.0f}%" for value in row))
    console.print(table)
    console.print(f"{out / 'agreement.json'}, {out / 'agreement.png'}")
