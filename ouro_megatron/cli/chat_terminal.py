"""The terminal side of `ouro chat`: lines in, coloured tokens out. Works with pipes as well."""

import contextlib
import sys
from collections.abc import Generator
from dataclasses import replace
from typing import cast

from rich.console import Console

from ouro_megatron.cli.depth_text import depth_summary, token_text
from ouro_megatron.errors import RequestError
from ouro_megatron.inference.conversation import Conversation
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.load import OpenModel
from ouro_megatron.inference.request import Finished, GeneratedToken

_HELP = (
    "/exit q=0.8 | step=3 | change=0.1 | expected | all   /loops N   /temperature X   /reset   /undo   /help   /quit"
)


class ChatTerminal:
    """Reads lines until the end of input or /quit."""

    def __init__(self, conversation: Conversation, model: OpenModel, depths: bool) -> None:
        self._conversation, self._model, self._depths = conversation, model, depths
        self._console = Console(highlight=False, soft_wrap=True)
        self._asks = sys.stdin.isatty()
        if self._asks:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then has a history and moves with the arrow keys)

    def run(self) -> None:
        """Returns at the end of the conversation."""
        if self._asks:
            settings = self._model.engine.settings
            self._console.print(
                f"{self._model.name}: context {settings.context}, {settings.max_loops} loops, "
                f"exit {self._conversation.request.exit_policy}. /help lists commands.",
                style="dim",
            )
        while True:
            try:
                line = input("> " if self._asks else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._console.print()
                return
            if line.strip() in ("/quit", "/q"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line[1:].split(maxsplit=1))
                elif line.strip():
                    self._answer(line)
            except RequestError as error:
                self._console.print(f"error: {error}", style="red", markup=False)

    def _command(self, name: str = "", value: str = "") -> None:
        talk = self._conversation
        if name == "reset":
            talk.reset()
            self._note("a new conversation")
        elif name == "undo":
            self._note("the last question and its answer are forgotten" if talk.undo() else "nothing to take back")
        elif name == "exit":
            self._change(exit_policy=ExitPolicy.parse(value))
        elif name == "loops" and value.isdigit():
            self._change(max_loops=int(value))
        elif name == "temperature" and value.replace(".", "", 1).isdigit():
            self._change(sampling=replace(talk.request.sampling, temperature=float(value)))
        else:
            if name != "help":
                self._note(f"not a command: /{name} {value}".rstrip())
            self._console.print(_HELP, markup=False)

    def _note(self, text: str) -> None:
        self._console.print(f"({text})", style="dim", markup=False)

    def _change(self, **fields: object) -> None:
        """Takes new settings when the engine can serve them."""
        changed = replace(self._conversation.request, **fields)  # type: ignore[arg-type]
        self._model.engine.check(replace(changed, prompt=(0,), max_tokens=None))
        self._conversation.request = changed
        loops = changed.max_loops or self._model.engine.settings.max_loops
        self._note(f"exit {changed.exit_policy}, {loops} loops, temperature {changed.sampling.temperature:g}")

    def _answer(self, line: str) -> None:
        console, loops = self._console, self._model.engine.settings.max_loops
        depths: list[int] = []
        answer = cast(Generator[GeneratedToken | Finished], self._conversation.ask(line))
        reason = "stop"
        try:
            for item in answer:
                if isinstance(item, GeneratedToken):
                    depths.append(item.depth)
                    console.print(token_text(item, loops, self._depths and console.is_terminal, True), end="")
                else:
                    console.print(item.text, markup=False, end="")
                    reason = item.reason
        except KeyboardInterrupt:
            answer.close()
            reason = "stopped by you"
        console.print()
        if reason != "stop":
            self._note({"length": "cut off at the most tokens allowed"}.get(reason, reason))
        if depths and self._depths:
            depth_summary(console, depths, loops)
