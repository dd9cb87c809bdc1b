"""The commands' side of the HTTP interface."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, Self
from urllib.parse import quote

import httpx
import typer

from adapters.errors import DeltamuxError, InvalidDelta, InvalidRequest, Unavailable

UNAUTHORIZED = 401
KEY_VARIABLE = "DELTAMUX_API_KEY"
"""Where the commands find the key that they show. Not a flag: every user of a machine can read its command lines."""
DEFAULT_SERVER = "http://127.0.0.1:8000"
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # an upload's answer comes when the delta is validated

ServerOption = Annotated[str, typer.Option("--server", help="URL of the server.", metavar="URL")]
JsonObject = dict[str, Any]


class Client:
    """One server. Every method returns the body of the answer, or raises what the server says is wrong."""

    def __init__(self, server: str) -> None:
        try:
            self._http = httpx.Client(base_url=server.rstrip("/"), timeout=_TIMEOUT, headers=_credentials())
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"{server!r} is not a URL: {error}.", param="server") from None
        self._server = server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def call(self, method: str, *path: str, **options: Any) -> JsonObject:
        """Send one request; `path` in segments, `options` as httpx takes them."""
        with _reachable(self._server):
            answer = self._http.request(method, _joined(path), **options)
        return body_of(answer)

    @contextmanager
    def stream(self, *path: str) -> Iterator[httpx.Response]:
        """The answer to a GET whose body is no JSON, not read yet. Raises what the server says is wrong."""
        with _reachable(self._server), self._http.stream("GET", _joined(path)) as answer:
            if not answer.is_success:
                answer.read()
                body_of(answer)
            yield answer

    def pages(self, *path: str) -> Iterator[JsonObject]:
        """Every item of a listing that is paged by name."""
        after: str | None = None
        while True:
            page = self.call("GET", *path, params={"after": after} if after else None)
            yield from page["data"]
            after = page["last_id"]
            if not page["has_more"]:
                return


def _joined(path: Sequence[str]) -> str:
    return "/" + "/".join(quote(part, safe="") for part in path)


def _credentials() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    return {"authorization": f"Bearer {key}"} if key else {}


def body_of(answer: httpx.Response) -> JsonObject:
    """The body of a good answer. Raises DeltamuxError with what the server says otherwise."""
    try:
        body = answer.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Unavailable(
            f"The server answered {answer.status_code} without a JSON object.",
            param="server",
            remedy="Check that the URL is a deltamux server's.",
        )
    if answer.is_success:
        return body
    error = body.get("error")
    if not isinstance(error, dict):
        raise Unavailable(f"The server answered {answer.status_code}.", param="server")
    if problems := error.get("problems"):
        raise InvalidDelta([str(problem) for problem in problems], param=error.get("param"))
    remedy = f"Put a key in {KEY_VARIABLE}." if answer.status_code == UNAUTHORIZED else None
    raise DeltamuxError(str(error.get("message")), param=error.get("param"), remedy=remedy)


@contextmanager
def _reachable(server: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        raise Unavailable(
            f"The server at {server} does not answer: {error}.",
            param="server",
            remedy="Start one with `deltamux serve` or `deltamux demo`, or name another with --server.",
        ) from None
