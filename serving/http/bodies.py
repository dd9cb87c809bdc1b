"""Bounded request bodies: a body over its limit is refused at the first excess byte, or before the first one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

from serving.config import Limits
from serving.http.access import Gate, GatedRoute


def bounded_receive(request: Request, max_bytes: int) -> Receive:
    """`request.receive` that stops over `max_bytes`.

    Raises HTTPException 413: the one error that FastAPI passes on unchanged while it reads a body.
    """
    declared = request.headers.get("content-length", "")
    declared_bytes = int(declared) if declared.isascii() and declared.isdigit() else 0
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        if declared_bytes > max_bytes:  # nothing of it is read
            raise HTTPException(413, f"The body has {declared_bytes} bytes, the limit is {max_bytes}.")
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise HTTPException(413, f"The body is longer than the limit of {max_bytes} bytes.")
        return message

    return receive


class JsonRequest(Request):
    """A request whose JSON body is parsed strictly: UTF-8 without lone surrogates, bounded nesting and length of lists.

    Parsing holds the event loop, by the value: a text of 8 MiB takes a few milliseconds, a list of as many bytes half a
    second. Values are counted by the commas, those in texts included.
    """

    def __init__(self, scope: Scope, receive: Receive, *, max_values: int) -> None:
        super().__init__(scope, receive)
        self._max_values = max_values

    async def json(self) -> Any:
        """The parsed body. NaN and Infinity pass here, so that the field's own check can name the field."""
        body = await self.body()
        if body.count(b",") >= self._max_values:
            raise HTTPException(
                413, f"The body has more than {self._max_values} values (commas are counted)."
            )
        try:
            return from_json(body, allow_inf_nan=True)
        except ValueError as error:
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from None


Handler = Callable[[Request], Awaitable[Response]]
Around = Callable[[Request, Handler], Awaitable[Response]]


def json_route(
    limits: Limits, gate: Callable[[APIRoute], Gate], *, around: Around | None = None
) -> type[APIRoute]:
    """A route class that lets callers through `gate`, then reads as much JSON as `limits` allow.

    `around` is given each request, bounded and not read yet, and what answers it. Without it, a route that declares no
    body reads what comes, and bounds it, itself.
    """

    class JsonRoute(GatedRoute):
        limit_bytes: ClassVar[int] = limits.max_body_bytes

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle, check = super().get_route_handler(), gate(self)

            async def handle_bounded(request: Request) -> Response:
                await check(request)
                if self.body_field is None and around is None:
                    return await handle(request)
                receive = bounded_receive(request, self.limit_bytes)
                bounded = JsonRequest(request.scope, receive, max_values=limits.max_body_values)
                return await (around(bounded, handle) if around else handle(bounded))

            return handle_bounded

    return JsonRoute
