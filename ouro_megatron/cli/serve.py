"""`ouro serve`."""

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


def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the run's name when left out.")] = None,
    exit_policy: Exit = "all",
    max_loops: MaxLoops = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that run at one time.")] = 8,
    max_requests: Annotated[int, typer.Option(min=1, help="Answers that may wait or run; more get a 429.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request body in bytes.")] = 4 * 2**20,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take, waiting included.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds that running requests have after TERM.")] = 20.0,
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
    """Serve a model over HTTP, compatible with OpenAI's clients.

    A request may choose its own depth: "ouro": {"exit": "q=0.8", "max_loops": 8}.

    Examples:

        ouro serve runs/demo/4-gate --exit q=0.7 --max-loops 8

        ouro serve hf-folder --port 8080 --slots 16 --cache last --dtype bf16

        curl localhost:8000/v1/completions -d '{"prompt": "def ", "ouro": {"exit": "step=2"}}'
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
        slots=slots,
    )
    from ouro_megatron.inference.exit_policy import ExitPolicy
    from ouro_megatron.inference.server import run

    policy = ExitPolicy.parse(exit_policy)
    run.require_serve_extra()
    from ouro_megatron.inference.server.app import ServerLimits

    template = chat_template.read_text(encoding="utf-8") if chat_template else None
    run.serve(
        options,
        run.ServeOptions(host, port, name, policy, template),
        ServerLimits(max_requests, max_body, timeout, grace=grace),
    )
