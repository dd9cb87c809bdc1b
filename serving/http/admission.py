"""From a request that is understood to one that runs: rates, concurrency, its row in the ledger; and all of it back.

The order of refusals: key (401), scope (403), visible model (404), requests per minute, tokens per minute, concurrency
(429 each), and behind these the engine's own queue (429).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from adapters.errors import DeltamuxError
from serving.http.counting import Usage
from serving.http.edge import set_answer_headers
from serving.http.errors import log_unhandled
from serving.tenancy.buckets import Buckets, Kind, Share, Standings
from serving.tenancy.ledger import Ledger, Outcome
from serving.tenancy.places import Places
from serving.tenancy.principal import Limits, Principal


class Admission:
    """Admits requests of all tenants. Use from one event loop."""

    def __init__(self, buckets: Buckets, places: Places, ledger: Ledger) -> None:
        self._buckets = buckets
        self._places = places
        self._ledger = ledger
        self._giving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def admitted(
        self, request: Request, caller: Principal, job_id: str, *, adapter_digest: str | None, usage: Usage
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Run the block as one of the caller's requests, whose tokens are in `usage` when it ends.

        `job_id`: unique; the ledger's row has it. `adapter_digest`: bare hex, or BASE. What the block gets it has to
        await before its first output: then the request is in the ledger. Raises RateLimited, QuotaExceeded, after
        which the request has cost nothing.
        """
        await self._take(request, caller, job_id, usage.reserved_tokens)
        written = self._ledger.open(
            job_id,
            caller.tenant,
            caller.key_id,
            adapter_digest=adapter_digest,
            reserved_tokens=usage.reserved_tokens,
        )
        usage.on_surplus = lambda surplus: self._give_back(caller, tokens=surplus, requests=0)
        outcome = Outcome.FAILED
        try:
            yield lambda: _wait(written)
            outcome = Outcome.COMPLETED
        except (GeneratorExit, asyncio.CancelledError, ClientDisconnect):
            outcome = Outcome.CANCELLED
            raise
        finally:
            self._places.free(caller.tenant, job_id)
            used = usage.spent(unknown_prompts=outcome is Outcome.CANCELLED)
            self._give_back(caller, tokens=usage.reserved_tokens - used, requests=0)
            self._ledger.close(job_id, outcome, usage.tokens())

    async def _take(self, request: Request, caller: Principal, job_id: str, tokens: int) -> None:
        """Take rates and a place. It goes on where its caller does not: what it took then comes back."""

        def undo(taking: asyncio.Future[None]) -> None:
            if not taking.cancelled() and taking.exception() is None:
                self._places.free(caller.tenant, job_id)
                self._give_back(caller, tokens=tokens, requests=1)

        taking = asyncio.ensure_future(self._take_all(request, caller, job_id, tokens))
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(undo)
            raise

    async def _take_all(self, request: Request, caller: Principal, job_id: str, tokens: int) -> None:
        shares = _shares(caller.limits, requests=1, tokens=tokens)
        if shares:
            try:
                standings = await self._buckets.take(caller.tenant, shares)
            except DeltamuxError:
                set_answer_headers(request, _headers(await self._buckets.standings(caller.tenant, shares)))
                raise
            set_answer_headers(request, _headers(standings))
        try:
            await self._places.take(caller.tenant, job_id, caller.limits.max_concurrency)
        except BaseException:
            self._give_back(caller, tokens=tokens, requests=1)
            raise

    def _give_back(self, caller: Principal, *, tokens: int, requests: int) -> None:
        """Without waiting for it: the caller may be gone, and whoever waits for it may be cancelled."""
        shares = [s for s in _shares(caller.limits, requests=requests, tokens=tokens) if s.cost]
        if shares:
            task = asyncio.create_task(self._buckets.give(caller.tenant, shares))
            self._giving.add(task)
            task.add_done_callback(self._given)

    def _given(self, task: asyncio.Task[None]) -> None:
        self._giving.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            # the bucket refills all the same, only more slowly
            log_unhandled(error, "giving back tokens")


async def _wait(written: Future[None]) -> None:
    if written.done():  # the usual case after the first token, at no cost
        written.result()
    else:
        await asyncio.wrap_future(written)


def _shares(limits: Limits, *, requests: int, tokens: int) -> Sequence[Share]:
    bounds = (
        (Kind.REQUESTS, limits.requests_per_min, requests),
        (Kind.TOKENS, limits.tokens_per_min, tokens),
    )
    return [Share(kind, limit, cost) for kind, limit, cost in bounds if limit is not None]


def _headers(standings: Standings) -> dict[str, str]:
    found = {}
    for kind, standing in standings.items():
        found[f"x-ratelimit-limit-{kind}"] = str(standing.limit)
        found[f"x-ratelimit-remaining-{kind}"] = str(standing.remaining)
        found[f"x-ratelimit-reset-{kind}"] = duration(standing.reset_s)
    return found


def duration(seconds: float) -> str:
    """`seconds`, rounded up to milliseconds, as OpenAI writes it: `20ms`, `1s`, `6m0s`, `1.5s`."""
    ms = max(0, math.ceil(seconds * 1000))
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
