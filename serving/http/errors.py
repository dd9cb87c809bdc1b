"""Exception -> status, headers and the OpenAI envelope. One table; every answer that is an error goes through it."""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from adapters import errors

log = logging.getLogger("deltamux.http")

JsonObject = dict[str, Any]

INVALID_REQUEST_TYPE = "invalid_request_error"
INTERNAL_MESSAGE = (
    "The server failed on this request. Try again; if it persists, give the operator x-request-id."
)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one class of errors is answered. `code` is OpenAI's where OpenAI has one."""

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)


_RETRY_SOON = {"retry-after": "1"}
INTERNAL = Answer(500, "server_error", "internal_error")

ANSWERS: Mapping[type[errors.DeltamuxError], Answer] = {
    errors.DeltamuxError: INTERNAL,
    errors.InvalidRequest: Answer(400, INVALID_REQUEST_TYPE, "invalid_value"),
    errors.ContextLengthExceeded: Answer(400, INVALID_REQUEST_TYPE, "context_length_exceeded"),
    errors.InvalidDelta: Answer(400, INVALID_REQUEST_TYPE, "invalid_adapter"),
    errors.InvalidSignature: Answer(400, INVALID_REQUEST_TYPE, "invalid_signature"),
    errors.PayloadTooLarge: Answer(413, INVALID_REQUEST_TYPE, "payload_too_large"),
    errors.Unauthenticated: Answer(
        401, INVALID_REQUEST_TYPE, "invalid_api_key", {"www-authenticate": "Bearer"}
    ),
    errors.Forbidden: Answer(403, INVALID_REQUEST_TYPE, "insufficient_permissions"),
    errors.NotFound: Answer(404, INVALID_REQUEST_TYPE, "not_found"),
    # the SDK repeats every 409 unless told otherwise; a lost compare-and-swap stays lost
    errors.Conflict: Answer(409, INVALID_REQUEST_TYPE, "conflict", {"x-should-retry": "false"}),
    errors.Overloaded: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.RateLimited: Answer(429, "rate_limit_error", "rate_limit_exceeded", {"x-should-retry": "true"}),
    errors.QuotaExceeded: Answer(
        429, "insufficient_quota", "insufficient_quota", {"x-should-retry": "false"}
    ),
    errors.Unavailable: Answer(503, "service_unavailable_error", "unavailable", _RETRY_SOON),
}
"""A class that is not listed is answered as its nearest base."""

_HTTP_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}
_HTTP_MESSAGES = {
    404: "This server has no such route. See /docs for those it has.",
    405: "This route does not take this method. See /docs.",
}
_VALIDATION_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_MAX_PROBLEMS_SHOWN = 5
_MAX_PARAM_CHARS = 80
_FIELD = re.compile(r"\w[\w.:/@-]*")


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A finished error: what to send, and how."""

    status: int
    body: JsonObject
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """The code that the caller sees."""
        return str(self.body["error"]["code"])

    def response(self) -> JSONResponse:
        """This error as a whole reply."""
        return JSONResponse(self.body, self.status, dict(self.headers))


def reply_to(error: BaseException) -> ErrorReply:
    """The answer to `error`. One that is not ours is answered 500 with a fixed text."""
    if not isinstance(error, errors.DeltamuxError):
        return ErrorReply(INTERNAL.status, _envelope(INTERNAL_MESSAGE, INTERNAL.type, None, INTERNAL.code))
    answer = next(ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS)
    code = answer.code
    if isinstance(error, errors.NotFound) and error.param == "model":
        code = "model_not_found"
    body = _envelope(str(error), answer.type, error.param, code)
    if isinstance(error, errors.InvalidDelta):
        body["error"]["problems"] = list(error.problems)
    headers = dict(answer.headers)
    if isinstance(error, errors.Overloaded) and not isinstance(
        error, errors.QuotaExceeded
    ):  # the SDK prefers the milliseconds
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    return ErrorReply(answer.status, body, headers)


def log_unhandled(error: Exception, request_id: str) -> None:
    """Log where `error` came from, not its text: messages of libraries can quote the caller's input."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s: unhandled %s\n%s", request_id, type(error).__qualname__, frames)


def install_handlers(app: FastAPI) -> None:
    """Answer our errors, the framework's and failed validation in the envelope."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return reply_to(error).response()

    async def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), type(error)
        headers = error.headers
        if error.status_code == 405:  # the router names the methods of the first route of this path only
            headers = {"allow": ", ".join(sorted(_methods(app, request.scope["path"])))}
        code = _HTTP_CODES.get(error.status_code, "http_error")
        message = _HTTP_MESSAGES.get(error.status_code, str(error.detail))
        body = _envelope(message, INVALID_REQUEST_TYPE, None, code)
        # A 413 leaves the connection open: closed under a body that is still being sent, most clients (httpx, and
        # so the SDK) report the reset and never read the answer. The server drops what still comes.
        return JSONResponse(body, error.status_code, headers)

    async def validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), type(error)
        return JSONResponse(_validation_envelope(error.errors()), 400)

    app.add_exception_handler(errors.DeltamuxError, ours)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, validation)


def _methods(app: FastAPI, path: str) -> set[str]:
    """Every method that some route of `app` takes at `path`."""
    return {
        method
        for route in iter_route_contexts(app.routes)
        if route.path is not None and compile_path(route.path)[0].match(path)
        for method in route.methods or ()
    }


def _envelope(message: str, kind: str, param: str | None, code: str) -> JsonObject:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _validation_envelope(problems: Sequence[Mapping[str, Any]]) -> JsonObject:
    """Name the fields at fault. `param` and `code` are the first one's."""
    sentences = []
    for problem in problems[:_MAX_PROBLEMS_SHOWN]:
        param = _param(problem["loc"])
        known = problem["type"] != "extra_forbidden"
        sentences.append(
            f"{param}: {problem['msg']}." if known else f"{param}: unknown or not supported here."
        )
    if (more := len(problems) - _MAX_PROBLEMS_SHOWN) > 0:
        sentences.append(f"({more} more)")
    first = problems[0]
    code = _VALIDATION_CODES.get(first["type"], "invalid_value")
    return _envelope(" ".join(sentences), INVALID_REQUEST_TYPE, _param(first["loc"]), code)


def _param(location: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "content")` as `messages[0].content`; names of union branches are left out."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _FIELD.fullmatch(part[:_MAX_PARAM_CHARS]):
            path += f".{part}" if path else part
    return path[:_MAX_PARAM_CHARS] or str(location[0])
