"""`ouro checkpoint`: show and average checkpoints."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ouro_megatron.checkpoint.state import StageRecord

checkpoint = typer.Typer(help="Show and average checkpoints.", no_args_is_help=True)


@checkpoint.command()
def show(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its newest is taken).")],
) -> None:
    """Print where a checkpoint stands and its lineage: every stage it went through.

    Example:

        ouro checkpoint show runs/demo/4-gate
    """
    from rich.console import Console
    from rich.table import Table

    from ouro_megatron.checkpoint.folder import resolve
    from ouro_megatron.checkpoint.state import read_state, record_of, tokens_in_all
    from ouro_megatron.telemetry.text import big, duration

    found = resolve(path)
    state = read_state(found.folder)
    console = Console(highlight=False, soft_wrap=True)
    for line in found.skipped:
        console.print(f"passed over: {line}", style="yellow")
    console.print(f"[bold]{found.folder}[/]")
    if state.origin == "training":
        console.print(
            f"step {state.step} of {state.recipe['name']}: {big(state.tokens)} tokens of this stage, "
            f"{big(tokens_in_all(state))} in all; {state.optimizer_steps} updates, {state.skipped_steps} skipped, "
            f"{duration(state.seconds)} of steps; next sample {state.next_sample}; "
            f"saved on {state.world}"
        )
    else:
        console.print(f"made from other checkpoints ({state.origin}); {big(tokens_in_all(state))} tokens in all")
    table = Table(
        "", "stage", "tokens", "in all", "steps", "layers x loops", "sequence", "RoPE", "batch", "rate", "beta"
    )
    records = [*state.history, *([record_of(state, found.folder)] if state.origin == "training" else [])]
    total = 0
    for number, record in enumerate(records, start=1):
        total += record.tokens
        table.add_row(str(number), *_row(record, total))
    wide = console if console.is_terminal else Console(width=max(console.width, 140), highlight=False)
    wide.print(table)
    for number, record in enumerate(records, start=1):
        console.print(f"{number}: {_about(record)}")


def _row(record: "StageRecord", total: int) -> list[str]:
    from ouro_megatron.recipe.spans import format_amount
    from ouro_megatron.telemetry.text import big

    facts = record.facts
    if not facts:
        return [record.name, big(record.tokens), big(total), str(record.steps or ""), "", "", "", "", "", ""]
    rate = f"{facts['lr']:g}" + (f" to {facts['min_lr']:g}" if facts["schedule"] != "constant" else "")
    return [
        record.name,
        big(record.tokens),
        big(total),
        str(record.steps),
        f"{facts['layers']} x {' then '.join(map(str, facts['loops']))}",
        str(facts["sequence_length"]),
        big(facts["rope_base"]),
        " then ".join(format_amount(tokens) for tokens in facts["global_tokens"]),
        rate,
        "gate" if facts["objective"] == "gate" else f"{facts['beta']:g}",
    ]


def _about(record: "StageRecord") -> str:
    facts = record.facts
    if not facts:
        return f"{record.name}: {record.detail}"
    total = sum(facts["blend"].values())
    blend = ", ".join(f"{name} {100 * weight / total:.3g}%" for name, weight in facts["blend"].items())
    carried = [
        word
        for word, on in (("optimizer", "optimizer_carried"), ("data position", "data_position_carried"))
        if facts[on]
    ]
    where = f"; {record.checkpoint}" if record.checkpoint else ""
    began = ", ".join(["took over weights", *carried]) if facts["started_from"] else "new weights"
    return f"{record.name}: {began}; {blend}{where}"


@checkpoint.command()
def average(
    sources: Annotated[list[Path], typer.Argument(help="One run folder (with --last), or several checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    last: Annotated[int | None, typer.Option(min=2, help="Take the newest so many of the run.")] = None,
) -> None:
    """Average the weights of checkpoints of one model: the last few of a stage are usually better together.

    Examples:

        ouro checkpoint average runs/demo/3-anneal --last 2 --out runs/demo/averaged

        ouro checkpoint average runs/a/checkpoints/step-00000040 runs/a/checkpoints/step-00000050 --out runs/mean
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.checkpoint.average import average_files

    chosen = average_files(sources, out, last)
    typer.echo(f"{out}: the mean of {', '.join(str(folder) for folder in chosen)}")
