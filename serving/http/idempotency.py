"""`Idempotency-Key`: the same request again gets the first one's answer.

Only successes are kept; a refusal has changed nothing, so its key can be used again. Routes whose body is a stream
call `once` when they know what they have received; the others are of a route class that does (`around`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request, Response

from adapters.errors import DeltamuxError, InvalidRequest
from adapters.idempotency import Answer, IdempotencyKeys
from serving.config import Settings, linger_s
from serving.http.bodies import Handler
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

log = logging.getLogger("deltamux.http")

HEADER = "idempotency-key"
REPLAYED = {"idempotent-replayed": "true"}
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_OK = range(200, 300)


class Idempotency:
    """Carries requests out once per key. Use from one event loop."""

    def __init__(self, keys: IdempotencyKeys, settings: Settings) -> None:
        self._keys = keys
        self._claim_s = linger_s(settings)
        self._keep_s = settings.limits.idempotency_s
        self._running: set[asyncio.Task[Response]] = set()

    async def around(self, request: Request, handle: Handler) -> Response:
        """Answer a request that changes something and whose body, if any, is JSON."""
        if request.method == "GET" or HEADER not in request.headers:
            return await handle(request)
        body = await request.body()
        caller: Principal = request.state.caller
        return await self.once(request, caller, [body], lambda: handle(request))

    async def once(
        self,
        request: Request,
        caller: Principal,
        content: Iterable[bytes],
        work: Callable[[], Awaitable[Response]],
    ) -> Response:
        """`work()`, or its recorded answer; `content` is what the request brings beside its address.

        The work runs to its end even where its caller leaves, so that its outcome is known. Raises what it raises,
        InvalidRequest for a header that is no key, IdempotencyKeyReused, InProgress.
        """
        key = request.headers.get(HEADER)
        if key is None:
            return await self._to_its_end(work())
        if not _KEY.fullmatch(key):
            raise InvalidRequest(
                "idempotency-key: expected 1 to 255 printable ASCII characters without spaces.", param=HEADER
            )
        fingerprint = await in_thread(_fingerprint, request, content)  # of a large upload: not on the loop
        claim = await in_thread(self._keys.claim, caller.tenant, key, fingerprint, self._claim_s)
        if isinstance(claim, Answer):
            if claim.adapter_digest:
                request.state.adapter_digest = claim.adapter_digest
            return Response(claim.body, claim.status, REPLAYED, "application/json")
        return await self._to_its_end(self._recorded(request, caller.tenant, key, claim, work()))

    async def _recorded(
        self, request: Request, tenant: str, key: str, claim: str, work: Awaitable[Response]
    ) -> Response:
        try:
            response = await work
        except BaseException:
            await self._give_up(tenant, key, claim)
            raise
        if response.status_code not in _OK:
            await self._give_up(tenant, key, claim)
            return response
        digest = getattr(request.state, "adapter_digest", None)
        answer = Answer(response.status_code, bytes(response.body).decode(), digest)
        try:
            await in_thread(self._keys.record, tenant, key, claim, answer, self._keep_s)
        except (
            DeltamuxError
        ) as error:  # it is done all the same; until the claim ends, a repetition is told to wait
            log.warning("an answer was not kept for its idempotency key: %s", type(error).__name__)
        return response

    async def _give_up(self, tenant: str, key: str, claim: str) -> None:
        try:
            await in_thread(self._keys.give_up, tenant, key, claim)
        except DeltamuxError as error:  # the claim ends by itself
            log.warning("an idempotency key stays claimed: %s", type(error).__name__)

    async def _to_its_end(self, work: Awaitable[Response]) -> Response:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Response]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: nobody else does where the caller has left


def _fingerprint(request: Request, content: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in (request.method.encode(), request.url.path.encode(), request.url.query.encode(), *content):
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()
