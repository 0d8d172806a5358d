"""Errors in the shape that OpenAI's clients expect."""

from typing import Any

from ouro_megatron.errors import InferenceError, OuroError, RequestError
from ouro_megatron.inference.service import Busy


class ApiError(Exception):
    """One HTTP answer: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: OuroError) -> ApiError:
    """The answer to an error of ours."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, Busy):
        return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, InferenceError):
        return ApiError(503, str(error).splitlines()[0], kind="server_error", code="engine_failed")
    return ApiError(400, str(error))
