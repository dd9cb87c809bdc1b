"""What stands before Serve's own HTTP handling: headers by which a client could steer Serve are taken away.

Bodies are let through at a pace. Serve takes a body as fast as it comes, and holds in memory, several times over, what
the gateway has not taken yet; its event loop also carries every token stream.
"""

from __future__ import annotations

import asyncio
import time

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SERVE_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",  # would override the operator's limit
        b"x-request-disconnect-disabled",  # would let a generation run on after its caller has gone
        b"serve-multiplexed-model-id",  # would choose the replica
        b"x-session-id",  # the same
    }
)

BODY_BURST_BYTES = 1 << 20
BODY_BYTES_PER_S = 32 << 20
"""A body's first bytes pass as they come, the rest at this pace: what a gateway can hash and write beside its work."""

_REQUEST_ID = b"x-request-id"


class HeaderGuard:
    """ASGI middleware around Serve's proxy (or around a replica's own port, in the load profile)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on without Serve's headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if _plain(name) not in SERVE_HEADERS]

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _first_id_only(message.get("headers", ()))}
            await send(message)

        await self._app({**scope, "headers": headers}, paced(receive), send_one_id)


def paced(receive: Receive) -> Receive:
    """`receive` that takes a long body at BODY_BYTES_PER_S; its sender waits, as TCP has it."""
    started, num_bytes = time.monotonic(), 0

    async def receive_slowly() -> Message:
        nonlocal num_bytes
        if num_bytes > BODY_BURST_BYTES:
            due = started + (num_bytes - BODY_BURST_BYTES) / BODY_BYTES_PER_S
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return message

    return receive_slowly


def middlewares() -> list[Middleware]:
    """What Serve calls by name in each proxy (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(HeaderGuard)]


def _plain(name: bytes) -> bytes:
    # Serve takes underscores for hyphens
    return name.lower().replace(b"_", b"-")


def _first_id_only(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers` with one x-request-id, the gateway's: Serve adds its own behind it."""
    kept: list[tuple[bytes, bytes]] = []
    seen = False
    for name, value in headers:
        if name.lower() == _REQUEST_ID:
            if seen:
                continue
            seen = True
        kept.append((name, value))
    return kept
