"""The HTTP interface: /v1/models, /v1/completions, /v1/chat/completions in OpenAI's shapes, and /health."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import OuroError, RequestError
from ouro_megatron.inference.chat import ChatPrompts
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import Request
from ouro_megatron.inference.server.answers import Answer
from ouro_megatron.inference.server.errors import ApiError, api_error
from ouro_megatron.inference.server.exchange import Exchange
from ouro_megatron.inference.server.protocol import Body, ChatBody, CompletionBody, engine_requests, parse_body
from ouro_megatron.inference.service import EngineService


@dataclass(frozen=True)
class ServerLimits:
    requests: int = 64
    """Answers that may wait or run at one time; more are refused with 429."""
    body_bytes: int = 4 * 2**20
    timeout: float = 600.0
    """Seconds a request may take, its time in the queue included."""
    body_timeout: float = 30.0
    """Seconds in which a body must arrive."""
    grace: float = 20.0
    """Seconds that running requests have to finish after TERM."""


class Server:
    """Routes and what they share."""

    def __init__(
        self,
        service: EngineService,
        tokenizer: TextTokenizer,
        chat: ChatPrompts,
        *,
        name: str,
        exit_policy: ExitPolicy,
        limits: ServerLimits,
    ) -> None:
        self._service, self._tokenizer, self._chat = service, tokenizer, chat
        self._name, self._exit, self._limits = name, exit_policy, limits
        self._created = int(time.time())
        self._exchanges: set[Exchange] = set()
        self._stopping = False
        self.app = Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _answer_error,
                OuroError: _answer_error,
                HTTPException: _answer_error,
                Exception: _answer_error,
            },
        )

    def stop(self) -> None:
        """No more requests from now on."""
        self._stopping = True

    def cut_off(self) -> None:
        """Ends what is still running, with an error that says so."""
        for exchange in self._exchanges:
            exchange.fail(ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down"))

    async def health(self, http: HttpRequest) -> Response:
        failure = "shutting down" if self._stopping else self._service.failure
        body = {
            "status": "ok" if failure is None else failure.splitlines()[0],
            "model": self._name,
            "open_requests": self._service.open,
            "running": self._service.engine.running,
            "slots": self._service.engine.settings.slots,
        }
        return JSONResponse(body, 200 if failure is None else 503)

    def _model_object(self) -> dict[str, Any]:
        settings = self._service.engine.settings
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "ouro-megatron",
            "max_model_len": settings.context,
            "ouro": {"max_loops": settings.max_loops, "exit": str(self._exit), "cache": settings.cache},
        }

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model_object())

    def _check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self._name:
            message = f"the model {asked!r} is not served here; this is {self._name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def completions(self, http: HttpRequest) -> Response:
        body = parse_body(await self._read(http), CompletionBody)
        self._check_model(body.model)
        prompts = await run_in_threadpool(self._prompts, body)
        requests = engine_requests(
            body,
            prompts,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            default_exit=self._exit,
            stop_ids=frozenset({self._tokenizer.eod}),
        )
        answer = Answer("completion", self._name, requests, self._tokenizer, self._service.engine.settings.max_loops)
        return await self._answer(http, body, answer, requests)

    def _prompts(self, body: CompletionBody) -> list[tuple[int, ...]]:
        """Token ids of each prompt; an empty text starts a new document."""
        given = body.prompt
        if isinstance(given, list) and not given:
            raise RequestError("prompt: an empty list", field="prompt")
        texts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        return [
            tuple(self._tokenizer.encode(text) or [self._tokenizer.eod]) if isinstance(text, str) else tuple(text)
            for text in texts
        ]

    async def chat_completions(self, http: HttpRequest) -> Response:
        body = parse_body(await self._read(http), ChatBody)
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", field="top_logprobs")
        prompt = await run_in_threadpool(self._chat.encode, body.messages)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        requests = engine_requests(
            body,
            [prompt],
            max_tokens=limit,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            default_exit=self._exit,
            stop_ids=self._chat.stop_ids,
        )
        answer = Answer("chat", self._name, requests, self._tokenizer, self._service.engine.settings.max_loops)
        return await self._answer(http, body, answer, requests)

    async def _read(self, http: HttpRequest) -> bytes:
        """The body, within its limits of size and time."""
        if self._stopping:
            raise ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
        limit = self._limits.body_bytes
        declared = http.headers.get("content-length", "")
        content = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                if not (declared.isdigit() and int(declared) > limit):
                    async for piece in http.stream():
                        content += piece
                        if len(content) > limit:
                            break
                    else:
                        return bytes(content)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from error
        raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")

    async def _answer(self, http: HttpRequest, body: Body, answer: Answer, requests: list[Request]) -> Response:
        if len(requests) > self._limits.requests:
            raise RequestError(f"{len(requests)} answers asked for, at most {self._limits.requests} fit", field="n")
        exchange = Exchange(self._service, requests, self._limits.timeout)
        self._exchanges.add(exchange)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(self._stream(exchange, answer, usage), media_type="text/event-stream")
        return await self._whole(http, exchange, answer)

    async def _whole(self, http: HttpRequest, exchange: Exchange, answer: Answer) -> Response:
        async def collect() -> None:
            async for index, event in exchange.events():
                answer.choices[index].add(event)

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
        try:
            with exchange:
                await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not collecting.done():
                    raise ClientDisconnect
                collecting.result()
                return JSONResponse(answer.whole())
        finally:
            collecting.cancel()
            leaving.cancel()
            self._exchanges.discard(exchange)

    async def _stream(self, exchange: Exchange, answer: Answer, usage: bool) -> AsyncIterator[str]:
        """Server-sent events. Cancelled by the framework when the client is gone."""
        try:
            with exchange:
                for index in range(len(answer.choices)):
                    opening = answer.opening(index)
                    if opening is not None:
                        yield _event(opening)
                async for index, event in exchange.events():
                    answer.choices[index].add(event)
                    yield _event(answer.chunk(index, event))
                if usage:
                    yield _event(answer.usage_chunk())
        except ApiError as error:
            yield _event(error.body)
        finally:
            self._exchanges.discard(exchange)
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _answer_error(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, OuroError):
        error = api_error(error)
    if isinstance(error, HTTPException):
        message = {404: f"there is no {http.url.path} here", 405: f"{http.url.path} does not take {http.method}"}
        error = ApiError(error.status_code, message.get(error.status_code, error.detail))
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server failed on this request; its log says why", kind="server_error")
    return JSONResponse(error.body, error.status, headers={"retry-after": "1"} if error.status == 429 else None)
