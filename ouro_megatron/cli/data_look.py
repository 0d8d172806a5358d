"""`ouro data verify`, `stats`, `inspect` and `blend`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from data_prep.blend import Blend
    from data_prep.look import ShownDocument

Prefixes = Annotated[
    list[Path], typer.Argument(help="Path of a .bin/.idx pair without the suffix.", show_default=False)
]
Tokenizer = Annotated[
    Path | None, typer.Option(help="Tokenizer folder; the manifest's when left out.", show_default=False)
]


def table_console() -> Console:
    """Wide where no terminal says how wide: tables in a file are not cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def verify(prefixes: Prefixes, tokenizer: Tokenizer = None) -> None:
    """Read all of each pair: index, counts, hashes, ids below the vocabulary, loss mask.

    Example:

        ouro data verify data/demo/code data/demo/prose
    """
    from data_prep.verify import verify as check

    for prefix in prefixes:
        typer.echo(check(prefix, tokenizer))


def stats(
    prefixes: Prefixes,
    histogram: Annotated[
        Path | None, typer.Option(help="Write a PNG of document lengths, a row for each pair.", show_default=False)
    ] = None,
) -> None:
    """Documents, tokens, lengths and unigram entropy of each pair.

    Example:

        ouro data stats data/demo/code data/demo/prose --histogram lengths.png
    """
    from data_prep.look import save_histogram
    from data_prep.look import stats as describe

    names = (
        "data",
        "documents",
        "tokens",
        "in the loss",
        "shortest",
        "median",
        "longest",
        "ids used",
        "entropy (nats)",
    )
    table = Table(*names)
    found = [describe(prefix) for prefix in prefixes]
    for item in found:
        numbers = (item.documents, item.tokens, item.counted, item.shortest, item.median, item.longest, item.used_ids)
        table.add_row(str(item.prefix), *(f"{number:,}" for number in numbers), f"{item.unigram_entropy:.3f}")
    table_console().print(table)
    if histogram is not None:
        save_histogram(found, histogram)
        typer.echo(f"lengths: {histogram}")


def inspect(
    prefix: Annotated[Path, typer.Argument(help="Path of a .bin/.idx pair without the suffix.", show_default=False)],
    document: Annotated[int, typer.Option(min=0, help="First document to show.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many documents.")] = 1,
    tokenizer: Tokenizer = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids instead of text.")] = False,
    color: Annotated[bool | None, typer.Option(help="Colours; on in a terminal.", show_default=False)] = None,
) -> None:
    """Show documents as text or ids: green counts in the loss, grey does not, special tokens stand out.

    Example:

        ouro data inspect data/demo/prose --document 3
    """
    from data_prep.look import documents

    console = Console(
        highlight=False, soft_wrap=True, force_terminal=color, no_color=None if color is None else not color
    )
    for shown in documents(prefix, document, count, tokenizer):
        _show(console, shown, ids)


def _show(console: Console, shown: "ShownDocument", ids: bool) -> None:
    from rich.text import Text

    counted = "all count" if shown.loss is None else f"{sum(shown.loss):,} count in the loss"
    console.rule(f"document {shown.number}: {len(shown.ids):,} tokens, {counted}", style="cyan", align="left")
    if ids:
        counts = [True] * len(shown.ids) if shown.loss is None else shown.loss
        pairs = zip(shown.ids, counts, strict=True)
        console.print(Text(" ").join(Text(str(token), style="green" if count else "dim") for token, count in pairs))
        return
    text = Text()
    for run in shown.runs:
        # Without a mask everything counts, and colour would say nothing.
        style = "" if shown.loss is None else ("green" if run.counts else "dim")
        text.append(run.text, style=f"{style} reverse".strip() if run.special else style)
    console.print(text)


def blend(
    parts: Annotated[
        list[str],
        typer.Argument(help="A file of blends, or NAME=AMOUNT ('4404B' tokens or '73.4%').", show_default=False),
    ],
    stage: Annotated[str | None, typer.Option(help="Only this blend of the file.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the prepared pairs; the file's when left out.", show_default=False)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Tokens of the stage, for NAME=AMOUNT.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder to name in --out.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the recipe's data section here (YAML).", show_default=False)
    ] = None,
    megatron: Annotated[
        Path | None, typer.Option(help="Write Megatron's --data-args-path file here.", show_default=False)
    ] = None,
) -> None:
    """Shares and epochs of each source, as a recipe's data section and as Megatron's blend file.

    Examples:

        ouro data blend stages/blends/ouro.yaml

        ouro data blend stages/blends/ouro.yaml --stage stage-1 --out data.yaml --megatron blend.txt

        ouro data blend code=70% prose=30% --data data/demo --budget 20M
    """
    from data_prep.blend import choose_blends, write_blend

    console = table_console()
    blends = choose_blends(parts, stage, data, budget)
    for made in blends:
        _show_blend(console, made)
    write_blend(blends, out, megatron, tokenizer)


_BLEND_COLUMNS = ("share (%)", "tokens", "of", "epochs", "epochs so far", "pairs")


def _amount(tokens: float) -> str:
    """In the unit that blends are written in: 4,404B, 0.9B, 20M."""
    unit, name = (1e9, "B") if tokens >= 1e8 else (1e6, "M") if tokens >= 1e5 else (1e3, "k")
    return f"{tokens / unit:,.1f}".removesuffix(".0") + name


def _show_blend(console: Console, made: "Blend") -> None:
    table = Table("source", *(Column(name, justify="right") for name in _BLEND_COLUMNS))
    table.title = f"{made.name}: {_amount(made.total)} tokens"
    for row in made.rows:
        table.add_row(
            f"{row.origin}: {row.source}" if row.origin else row.source,
            f"{100 * row.share:.1f}",
            _amount(row.tokens),
            "?" if row.available is None else _amount(row.available),
            "?" if row.epochs is None else f"{row.epochs:.2f}",
            "?" if row.epochs_so_far is None else f"{row.epochs_so_far:.2f}",
            f"{len(row.prefixes):,}",
        )
    console.print(table)
    for warning in made.warnings:
        console.print(f"[yellow]warning:[/] {warning}")
