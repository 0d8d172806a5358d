"""`ouro generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from ouro_megatron.inference.generate import GeneratedToken


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its newest is taken).")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.", exists=True)] = None,
    exit_policy: Annotated[
        str, typer.Option("--exit", help="q=0.8: when the exit CDF reaches 0.8; step=3: at loop 3; all: the last loop.")
    ] = "all",
    max_loops: Annotated[int | None, typer.Option(min=1, help="Loops at most; the training's when left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    cache: Annotated[
        Literal["exact", "reuse"],
        typer.Option(help="exact: all loops run for every token; reuse: loops after the exit are skipped."),
    ] = "exact",
    depths: Annotated[
        bool, typer.Option("--depths", help="Show each token's exit loop (colours in a terminal).")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Append the sample to this JSON file, for the report.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Generate text with early exit.

    Examples:

        ouro generate runs/demo/4-gate --prompt "The list" --exit q=0.8 --depths

        ouro generate runs/demo/4-gate --prompt "def main" --exit step=2 --temperature 0.8 --max-loops 8
    """
    import warnings

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    from ouro_megatron.checkpoint.load import load_for_inference
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.generate import GenerationSettings, save_sample, stream

    policy = ExitPolicy.parse(exit_policy)
    if prompt_file is not None:
        if prompt:
            raise typer.BadParameter("give --prompt or --prompt-file, not both")
        prompt = prompt_file.read_text(encoding="utf-8")
    model = load_for_inference(checkpoint, device)
    settings = GenerationSettings(
        exit_policy=policy,
        max_loops=max_loops or model.recipe.model.loops,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cache=cache,
    )
    console = Console(highlight=False, soft_wrap=True)
    tokens: list[GeneratedToken] = []
    for token in stream(model.lm, model.tokenizer, prompt, settings):
        tokens.append(token)
        console.print(_shown(token, settings.max_loops, depths, console.is_terminal), end="")
    console.print()
    model.context.close()
    _summary(console, tokens, settings.max_loops, depths)
    if save is not None:
        save_sample(save, prompt, model.folder, policy, tokens)


def _shown(token: "GeneratedToken", loops: int, depths: bool, colour: bool) -> Text:
    from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb, ink_on

    if token.is_prompt or not depths:
        return Text(token.text, style="dim" if token.is_prompt and colour else "")
    if not colour:
        return Text(f"{token.text}[{token.depth}]")
    return Text(token.text, style=f"{ink_on(depth_rgb(token.depth, loops))} on {depth_hex(token.depth, loops)}")


def _swatch(loop: int, loops: int) -> Text:
    from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb, ink_on

    return Text(f" loop {loop} ", style=f"{ink_on(depth_rgb(loop, loops))} on {depth_hex(loop, loops)}")


def _summary(console: Console, tokens: "list[GeneratedToken]", loops: int, depths: bool) -> None:
    new = [token.depth for token in tokens if not token.is_prompt]
    if not new:
        console.print("(the document ended at once)")
    elif depths:
        if console.is_terminal:
            console.print(Text.assemble(*(_swatch(loop, loops) for loop in range(1, loops + 1))))
        counts = ", ".join(f"loop {depth}: {new.count(depth)}" for depth in sorted(set(new)))
        console.print(f"{len(new)} tokens, mean depth {sum(new) / len(new):.2f} of {loops} ({counts})", style="dim")
