"""`ouro data pack-report`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def pack_report(
    prefixes: Annotated[list[Path], typer.Argument(help="Path of a .bin/.idx pair without the suffix.")],
    sequence: Annotated[int, typer.Option(min=1, help="Tokens a sequence, as data.sequence_length.")],
    long: Annotated[
        Literal["truncate", "split", "drop"],
        typer.Option(help="What to do with longer documents, as data.long_documents."),
    ] = "split",
) -> None:
    """What packing would do: sequences, padding, documents left out, and how long documents are. Reads indices only.

    Example:

        ouro data pack-report data/sft/math data/sft/code --sequence 32768 --long truncate
    """
    from rich.console import Console
    from rich.table import Table

    from ouro_megatron.data.packing import pack_report as report

    console = Console()
    for prefix in prefixes:
        ways, histogram = report(prefix, sequence, long)
        table = Table("packing", "sequences", "padding", "documents a sequence", "too long", "tokens left out")
        for way, found in ways.items():
            each = found.pieces / max(1, found.sequences)
            numbers = (f"{found.waste:.2%}", f"{each:.1f}", f"{found.too_long:,}", f"{found.dropped_tokens:,}")
            table.add_row(way, f"{found.sequences:,}", *numbers)
        total = next(iter(ways.values()))
        console.print(f"{prefix}: {total.documents:,} documents, {total.tokens:,} tokens, sequences of {sequence:,}")
        console.print(table)
        lengths = Table("tokens a document", "documents", "share of the tokens", "")
        for shortest, longest, documents, tokens in histogram:
            share = tokens / max(1, total.tokens)
            bounds = f"{shortest:,}" if shortest >= longest else f"{shortest:,} to {longest:,}"
            lengths.add_row(bounds, f"{documents:,}", f"{share:.1%}", "#" * round(40 * share))
        console.print(lengths)
