"""The outermost layer: request ids, answer headers, counts, and the answer to whatever nobody else handled."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import log_unhandled, reply_to
from serving.metrics import GatewayMetrics

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_GONE = 499
"""Status that metrics show for a caller that went away before its answer began; nothing is sent."""


def set_adapter_digest(request: Request, digest: str | None) -> None:
    """Have the answer say which content it came from, also where it turns out to be an error."""
    request.state.adapter_digest = f"sha256:{digest}" if digest else "base"


def set_answer_headers(request: Request, headers: Mapping[str, str]) -> None:
    """Have the answer, or the error in its place, carry these."""
    request.state.answer_headers = headers


class Edge:
    """ASGI middleware. Nothing that an inner layer raises passes it, except a cancellation."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(Headers(scope=scope))
        status = CLIENT_GONE
        started = time.perf_counter()

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if digest := state.get("adapter_digest"):
                    headers["x-adapter-digest"] = digest
                headers.update(state.get("answer_headers", {}))
            await send(message)

        self._metrics.requests_in_flight.inc()
        try:
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            pass  # there is nobody to answer
        except Exception as error:
            log_unhandled(error, request_id)
            if status != CLIENT_GONE:
                # the answer has begun: break it off, with an exception whose text is ours
                raise RuntimeError("the answer was broken off") from None
            await reply_to(error).response()(scope, receive, send_marked)
        finally:
            self._metrics.requests_in_flight.dec()
            route = _route(scope)
            self._metrics.requests.labels(route=route, status=str(status)).inc()
            self._metrics.request_seconds.labels(route=route).observe(time.perf_counter() - started)


def _request_id(headers: Headers) -> str:
    sent = headers.get("x-request-id", "")
    return sent if _CLIENT_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"


def _route(scope: Scope) -> str:
    """The route's template, so that the label is one of a known set."""
    route: Any = scope.get("route")
    return str(route.path) if route is not None else "unmatched"
