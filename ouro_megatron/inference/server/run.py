"""`ouro serve`: a model, its engine and an HTTP server around them, until TERM or Ctrl-C."""

import asyncio
import importlib.util
import signal
import socket
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from ouro_megatron.errors import InferenceError
from ouro_megatron.inference.chat import ChatPrompts
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.load import ModelOptions, OpenModel, open_model
from ouro_megatron.inference.service import EngineService

if TYPE_CHECKING:
    from ouro_megatron.inference.server.app import ServerLimits

_WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class ServeOptions:
    """Everything of `ouro serve` but the model."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    name: str | None = None
    """What clients call the model; the run's name when None."""
    exit_policy: ExitPolicy = field(default_factory=ExitPolicy)
    """For requests that name none."""
    chat_template: str | None = None
    """Jinja text instead of the tokenizer's own template."""


def serve(model: ModelOptions, options: ServeOptions, limits: "ServerLimits") -> None:
    """Serves until a stop signal, and then until running requests are done or `limits.grace` is over.

    Raises InferenceError when the `serve` extra is missing, the port is taken, or the engine failed while serving.
    """
    listening = _listen(options.host, options.port)
    with (
        listening,
        open_model(model) as opened,
        EngineService(opened.engine, opened.leader, limit=limits.requests) as service,
    ):
        # A second signal, or one that the server hands on at its end, must not kill a process that is leaving.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *unused: None)
        _serve(opened, service, listening, options, limits)
        failure = service.failure
    if failure is not None:
        raise InferenceError(failure)


def require_serve_extra() -> None:
    """Raises InferenceError when starlette or uvicorn is not installed."""
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise InferenceError(f"{name} is needed to serve: pip install 'ouro-megatron[serve]'")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything heavy is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise InferenceError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from error
    return listening


def _serve(
    model: OpenModel, service: EngineService, listening: socket.socket, options: ServeOptions, limits: "ServerLimits"
) -> None:
    import uvicorn

    from ouro_megatron.inference.server.app import Server

    chat = ChatPrompts(model.tokenizer, options.chat_template)
    name = options.name or model.name
    server = Server(service, model.tokenizer, chat, name=name, exit_policy=options.exit_policy, limits=limits)

    class Uvicorn(uvicorn.Server):
        """Stops in two steps: no more requests at the signal, then an end to those that outlast the grace."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                print(f"stopping: requests under way have {limits.grace:g} seconds", flush=True)
                server.stop()
                asyncio.get_running_loop().call_later(limits.grace, server.cut_off)
            else:
                server.cut_off()
            self.should_exit = True

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or service.failure is not None

    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        # The cut above comes first and is kinder; this is for a client that does not read its answer.
        timeout_graceful_shutdown=int(limits.grace) + 5,
        lifespan="off",
    )
    # Whoever reads the line below may connect at once.
    listening.listen(128)
    host, port = listening.getsockname()[:2]
    settings = model.engine.settings
    print(
        f"serving {name} on http://{host}:{port}/v1  ({settings.slots} slots, context {settings.context}, "
        f"up to {settings.max_loops} loops, exit {options.exit_policy}, cache {settings.cache})",
        flush=True,
    )
    if chat.problem is not None:
        print(f"/v1/chat/completions is off: {chat.problem}", flush=True)
    Uvicorn(config).run(sockets=[listening])
    print("stopped", flush=True)
