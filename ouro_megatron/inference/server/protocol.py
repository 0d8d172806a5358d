"""Request bodies of /v1/completions and /v1/chat/completions, and the engine's requests they ask for."""

import difflib
import json
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ouro_megatron.errors import RequestError
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import Request, Sampling
from ouro_megatron.inference.server.errors import ApiError

_MOST_STOPS = 16


class OuroFields(BaseModel):
    """This project's own settings, under "ouro" in a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    exit: str | None = None
    """ "q=0.8", "step=3", "change=0.1", "expected" or "all"; the server's default when absent."""
    max_loops: int | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of request have. Fields that this server has no part for may only have their neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ouro: OuroFields | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0.0, le=0.0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0.0, le=0.0)] | None = None

    def stops(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(texts) > _MOST_STOPS or not all(texts):
            raise RequestError(f"stop: at most {_MOST_STOPS} texts, none empty", field="stop")
        return tuple(texts)


AnyBody = TypeVar("AnyBody", bound=Body)


class CompletionBody(Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class ChatBody(Body):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def parse_body(content: bytes, kind: type[AnyBody]) -> AnyBody:
    """Raises ApiError (400) that names the field, or the place in the JSON, and says what would be right."""
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is not JSON: nested too deeply", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(values).__name__}", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, kind) from error


def _refusal(error: ValidationError, kind: type[Body]) -> ApiError:
    first = error.errors(include_url=False)[0]
    # Of a union's members pydantic reports one after the other, with the member's name in the place.
    place = [str(part) for part in first["loc"]]
    field = ".".join(place[:2] if place[0] == "ouro" else place[:1])
    if first["type"] == "extra_forbidden":
        known = list(OuroFields.model_fields if place[0] == "ouro" else kind.model_fields)
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"unknown field {field!r}{hint}", param=field, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{field!r} is missing", param=field, code="missing_required_parameter")
    return ApiError(400, f"{field}: {first['msg']}", param=field, code="invalid_value")


def engine_requests(
    body: Body,
    prompts: list[tuple[int, ...]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    default_exit: ExitPolicy,
    stop_ids: frozenset[int],
) -> list[Request]:
    """`n` requests a prompt, in order. Without a seed they draw differently each time. Raises RequestError."""
    own = body.ouro or OuroFields()
    policy = ExitPolicy.parse(own.exit) if own.exit is not None else default_exit
    seed = secrets.randbits(62) if body.seed is None else body.seed
    return [
        Request(
            prompt,
            max_tokens,
            policy,
            own.max_loops,
            Sampling(body.temperature, body.top_k, body.top_p, seed + choice),
            body.stops(),
            stop_ids,
            logprobs,
        )
        for prompt in prompts
        for choice in range(body.n or 1)
    ]
