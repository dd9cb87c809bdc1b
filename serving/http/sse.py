"""Answers that end with their caller: server-sent events, and work that stops when the connection closes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.http.errors import INTERNAL, JsonObject, log_unhandled, reply_to

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def event(data: JsonObject) -> bytes:
    """One server-sent event."""
    return f"data: {_ENCODER.encode(data)}\n\n".encode()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and awaited when the caller goes away.

    Call it when the body has been read: `receive` is watched for the disconnect. Raises ClientDisconnect.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of events from `open_events`, which is closed when the caller goes away.

    An error before the first event is raised, so that it gets a status code; a later one is the last event of the
    stream, without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, open_events: Callable[[], AsyncGenerator[bytes, None]], request_id: str) -> None:
        # no Response.__init__: it would fix a content-length
        self.status_code = 200
        self.background = None
        self._open_events = open_events
        self._request_id = request_id
        # x-accel-buffering: a proxy that collects the stream defeats it
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI)
        """Send the stream."""
        await unless_disconnected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        started = False
        async with aclosing(self._open_events()) as events:
            while True:
                try:
                    data = await anext(events, None)
                except Exception as error:
                    if not started:
                        raise
                    data = self._last_words(error)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    break
                if data is None:
                    break
                if not started:
                    start = {"status": self.status_code, "headers": self.raw_headers}
                    await send({"type": "http.response.start", **start})
                    started = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _last_words(self, error: Exception) -> bytes:
        reply = reply_to(error)
        if reply.status == INTERNAL.status:
            log_unhandled(error, self._request_id)
        return event(reply.body)
