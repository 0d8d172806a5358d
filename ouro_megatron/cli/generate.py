"""`ouro generate`."""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ouro_megatron.cli.depth_text import depth_summary, token_text
from ouro_megatron.cli.inference_options import (
    Cache,
    Checkpoint,
    Context,
    Device,
    Dtype,
    Exit,
    MaxLoops,
    Skipped,
    Tensor,
    model_options,
)

if TYPE_CHECKING:
    from ouro_megatron.inference.generate import Completion, PromptLine
    from ouro_megatron.inference.load import OpenModel


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; give it several times for more.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read one prompt from a file.", exists=True)] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="One prompt a line; in a .jsonl file an object with prompt, max_tokens, exit, seed, ...", exists=True
        ),
    ] = None,
    exit_policy: Exit = "all",
    max_loops: MaxLoops = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="New tokens at most; 64 when left out.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int, typer.Option(help="Of each prompt's own draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")
    ] = None,
    cache: Cache = "all",
    skipped: Skipped = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts that run at one time.")] = 8,
    depths: Annotated[
        bool, typer.Option("--depths", help="Show each token's exit loop (colours in a terminal).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt and nothing else.")] = False,
    save: Annotated[Path | None, typer.Option(help="Append the samples to this JSON file, for the report.")] = None,
    context: Context = None,
    dtype: Dtype = "fp32",
    tensor: Tensor = 1,
    device: Device = "cpu",
) -> None:
    """Generate text with early exit, for one prompt or many at once.

    Examples:

        ouro generate runs/demo/4-gate --prompt "The list" --exit q=0.8 --depths

        ouro generate runs/demo/4-gate --prompt "def main" --exit step=2 --temperature 0.8 --max-loops 8

        ouro generate hf-folder --prompts-file prompts.jsonl --json --dtype bf16 --cache last
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    lines = _lines(prompt or [], prompt_file, prompts_file)
    options = model_options(
        checkpoint,
        dtype=dtype,
        device=device,
        tensor=tensor,
        max_loops=max_loops,
        context=context,
        cache=cache,
        skipped=skipped,
        slots=min(batch, len(lines)),
    )
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.generate import Completion, default_request, make_request, save_sample
    from ouro_megatron.inference.load import open_model
    from ouro_megatron.inference.request import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    defaults = default_request(ExitPolicy.parse(exit_policy), max_loops, max_tokens, sampling, stop or [])
    with open_model(options) as model:
        completions = [
            Completion(index, line.prompt, make_request(line, defaults, model)) for index, line in enumerate(lines)
        ]
        _run(model, completions, depths, as_json)
        if save is not None:
            for completion in completions:
                save_sample(save, completion, model.folder, model.tokenizer)


def _lines(prompts: list[str], prompt_file: Path | None, prompts_file: Path | None) -> "list[PromptLine]":
    from ouro_megatron.inference.generate import PromptLine, read_prompts

    if sum((bool(prompts), prompt_file is not None, prompts_file is not None)) > 1:
        raise typer.BadParameter("give --prompt, --prompt-file or --prompts-file, not several of them")
    if prompts_file is not None:
        return read_prompts(prompts_file)
    if prompt_file is not None:
        return [PromptLine(prompt=prompt_file.read_text(encoding="utf-8"))]
    return [PromptLine(prompt=text) for text in prompts or [""]]


def _run(model: "OpenModel", completions: "list[Completion]", depths: bool, as_json: bool) -> None:
    """One prompt is shown while it grows; of several each is shown when it and those before it are done."""
    from ouro_megatron.inference.generate import complete

    console = Console(highlight=False, soft_wrap=True)
    loops = model.engine.settings.max_loops
    live = len(completions) == 1 and not as_json
    shown = 0
    for item, event in complete(model.engine, completions):
        if live:
            if event.token is not None:
                if len(item.tokens) == 1:
                    _show_prompt(console, item)
                console.print(token_text(event.token, loops, depths, console.is_terminal), end="")
            elif event.finished is not None:
                console.print(event.finished.text, markup=False, end="")
        while shown < len(completions) and completions[shown].finished is not None:
            _show(console, completions[shown], loops, depths, as_json, live)
            shown += 1


def _show_prompt(console: Console, item: "Completion") -> None:
    console.print(item.prompt, style="dim" if console.is_terminal else None, markup=False, end="")


def _show(console: Console, item: "Completion", loops: int, depths: bool, as_json: bool, live: bool) -> None:
    if as_json:
        print(json.dumps(item.as_json(), ensure_ascii=False), flush=True)
        return
    if not live:
        console.print(f"--- {item.index + 1}", style="bold" if console.is_terminal else None)
    if not live or not item.tokens:
        _show_prompt(console, item)
    if not live:
        for token in item.tokens:
            console.print(token_text(token, loops, depths, console.is_terminal), end="")
        assert item.finished is not None
        console.print(item.finished.text, markup=False, end="")
    console.print()
    if not item.tokens:
        console.print("(the document ended at once)")
    elif depths:
        depth_summary(console, item.depths, loops)
