"""`ouro export` and `ouro import`: the published (Hugging Face) layout, out and in."""

import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its newest is taken).")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    dtype: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="bf16, as published; fp32 keeps the training weights bit for bit.")
    ] = "bf16",
    shard_size: Annotated[str, typer.Option(help="Largest safetensors file, in bytes: 5B, 500M.")] = "5B",
    max_positions: Annotated[
        int | None, typer.Option(min=1, help="max_position_embeddings; the stage's sequence length when left out.")
    ] = None,
    exit_threshold: Annotated[float, typer.Option(help="early_exit_threshold q, 0..1; 1 reads the last loop.")] = 1.0,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file; the tokenizer's own when left out.", exists=True)
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Load the result with transformers and compare logits, loop by loop.")
    ] = True,
) -> None:
    """Write a checkpoint in the published Ouro layout, with code that transformers can load.

    The folder gets its name when its logits agree with the checkpoint's; otherwise nothing is left behind.

    Examples:

        ouro export runs/demo/4-gate exported/demo

        ouro export runs/demo/4-gate exported/exact --dtype fp32 --shard-size 500M
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.checkpoint.huggingface.export import ExportSettings
    from ouro_megatron.checkpoint.huggingface.export import export as run
    from ouro_megatron.recipe.spans import parse_amount

    try:
        shard_bytes = parse_amount(shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shard-size") from error
    settings = ExportSettings(dtype, shard_bytes, max_positions, exit_threshold, chat_template, check)
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("tensors", total=None)
        exported = run(checkpoint, out, settings, lambda done, total: bars.update(task, completed=done, total=total))
    for line in exported.skipped:
        console.print(line)
    console.print(f"{exported.checkpoint} -> {exported.folder}: {dtype}, {len(exported.files)} files")
    if exported.agreement is None:
        console.print("not compared with transformers (--no-check)")
    else:
        console.print(f"logits here and through transformers, fp32, {exported.agreement.tokens} tokens:")
        console.print(exported.agreement.table())


def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder in the published layout (config.json, safetensors).")],
    out: Annotated[Path, typer.Argument(help="New checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; the one in FOLDER when left out.", exists=True)
    ] = None,
) -> None:
    """Read published Ouro weights into a checkpoint that any stage and any parallel layout can start from.

    Example:

        ouro import downloads/Ouro-1.4B runs/ouro-1.4b

    then init.checkpoint: runs/ouro-1.4b in a recipe whose model is stages/model/ouro-1.4b.yaml.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.checkpoint.huggingface.importer import import_pretrained

    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("tensors", total=None)
        model = import_pretrained(
            folder, out, lambda done, total: bars.update(task, completed=done, total=total), tokenizer=tokenizer
        )
    console.print(
        f"{folder} -> {out}: {model.layers} layers x {model.loops} loops, hidden {model.hidden}, vocabulary "
        f"{model.vocab}, RoPE base {model.rope_base:g}"
    )
