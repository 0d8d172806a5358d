"""How deep each token went, in a terminal: one colour a loop; numbers where there are no colours."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ouro_megatron.telemetry.depth_colors import depth_hex, depth_rgb, ink_on

if TYPE_CHECKING:
    from ouro_megatron.inference.request import GeneratedToken


def token_text(token: "GeneratedToken", loops: int, depths: bool, colour: bool) -> Text:
    """A token's text, with its depth when `depths` is set."""
    if not depths or not token.text:
        return Text(token.text)
    if not colour:
        return Text(f"{token.text}[{token.depth}]")
    return Text(token.text, style=_style(token.depth, loops))


def depth_summary(console: Console, depths: list[int], loops: int) -> None:
    """The colours' meaning, and how often each loop was left at."""
    if console.is_terminal:
        console.print(
            Text.assemble(*(Text(f" loop {loop} ", style=_style(loop, loops)) for loop in range(1, loops + 1)))
        )
    counts = ", ".join(f"loop {depth}: {depths.count(depth)}" for depth in sorted(set(depths)))
    mean = sum(depths) / len(depths)
    console.print(f"{len(depths)} tokens, mean depth {mean:.2f} of {loops} ({counts})", style="dim")


def _style(loop: int, loops: int) -> str:
    return f"{ink_on(depth_rgb(loop, loops))} on {depth_hex(loop, loops)}"
