"""`ouro chat`."""

from pathlib import Path
from typing import Annotated

import typer

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


def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    exit_policy: Exit = "all",
    max_loops: MaxLoops = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens an answer may have; what fits when left out.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option()] = 0,
    depths: Annotated[bool, typer.Option(help="Colour each token by the loop it left at.")] = True,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="No chat template: the conversation is one text that the model goes on with."),
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file instead of the tokenizer's chat template.", exists=True)
    ] = None,
    cache: Cache = "all",
    skipped: Skipped = None,
    context: Context = None,
    dtype: Dtype = "fp32",
    tensor: Tensor = 1,
    device: Device = "cpu",
) -> None:
    """Talk to a model in the terminal; each token's colour is the loop it left at.

    Lines that begin with / are commands: /exit q=0.5 and /loops 8 change the depth, /temperature 0.9, /reset starts
    over, /undo takes the last turn back, /help lists them, /quit or Ctrl-D ends. Ctrl-C ends an answer.

    Examples:

        ouro chat runs/reasoning-sft --exit q=0.8

        ouro chat runs/demo/4-gate --plain --max-loops 8 --exit q=0.7 --max-tokens 64
    """
    options = model_options(
        checkpoint,
        dtype=dtype,
        device=device,
        tensor=tensor,
        max_loops=max_loops,
        context=context,
        cache=cache,
        skipped=skipped,
        slots=1,
    )
    from ouro_megatron.cli.chat_terminal import ChatTerminal
    from ouro_megatron.inference.chat import ChatPrompts
    from ouro_megatron.inference.conversation import Conversation
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.generate import default_request
    from ouro_megatron.inference.load import open_model
    from ouro_megatron.inference.request import Sampling
    from ouro_megatron.inference.service import EngineService

    sampling = Sampling(temperature, top_k, top_p, seed)
    request = default_request(ExitPolicy.parse(exit_policy), max_loops, max_tokens, sampling, [])
    template = chat_template.read_text(encoding="utf-8") if chat_template else None
    with open_model(options) as model, EngineService(model.engine, model.leader) as service:
        prompts = None if plain else ChatPrompts(model.tokenizer, template)
        conversation = Conversation(service, model.tokenizer, prompts, request, system)
        ChatTerminal(conversation, model, depths).run()
