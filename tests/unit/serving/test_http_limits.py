"""Limits as the unmodified openai SDK meets them: exact counts, refunds, headers, retries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.errors import Overloaded, RegistryUnavailable
from serving.core import FailureEvent, GenerateCall
from serving.tenancy.buckets import Kind, Share
from tests.unit.serving.http_support import (
    BACKBONE,
    PROMPT_IDS,
    Batches,
    Clock,
    FakeBackend,
    Gateway,
    Pauses,
    gateway,
    tokens,
    until,
)
from tests.unit.serving.test_http_errors import assert_envelope

PROMPT = list(PROMPT_IDS)
USED = 6  # what the scripted backend answers with: three tokens in, three out


async def outcomes(g: Gateway, number: int, *, stream: bool = False, **options: Any) -> list[Any]:
    """Send `number` requests at once, of 3 + 7 tokens at most; what each ends with."""

    async def one() -> Any:
        try:
            made = await g.openai.completions.create(
                model=BACKBONE, prompt=PROMPT, max_tokens=7, stream=stream, **options
            )
            if stream:
                return [chunk async for chunk in made]
        except openai.APIStatusError as error:
            return error
        return made

    return await asyncio.gather(*(one() for _ in range(number)))


def refusals(found: Sequence[Any]) -> list[openai.RateLimitError]:
    return [item for item in found if isinstance(item, openai.RateLimitError)]


@pytest.mark.parametrize("counted_in", ["process", "database"])
@pytest.mark.parametrize("stream", [False, True])
async def test_100_tokens_a_minute_are_100_for_20_requests_at_once(
    tmp_path: Path, counted_in: str, stream: bool
) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend, clock=Clock(), counted_in=counted_in) as g:
        g.limited(tokens_per_min=100)
        sending = asyncio.create_task(outcomes(g, 20, stream=stream))
        route = {"route": "/v1/completions", "status": "429"}
        await until(lambda: len(backend.open_calls) + g.sample("deltamux_requests_total", **route) == 20)
        assert len(backend.calls) == 10  # 10 times 3 + 7: no more than 100, exactly, and no less
        assert backend.hold is not None
        backend.hold.set()
        found = await sending
        assert len(refusals(found)) == 10
        async with asyncio.timeout(5):  # each gives back what it did not use
            while await left(g, limit=100) != 100 - 10 * USED:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
async def test_two_gateways_that_count_in_the_database_share_100_tokens_a_minute(
    tmp_path: Path, url: str, stream: bool
) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    options: dict[str, Any] = {"clock": Clock(), "url": url, "counted_in": "database"}
    async with gateway(tmp_path, backend, **options) as g, gateway(tmp_path, backend, **options) as other:
        other.use(g.limited(tokens_per_min=100))
        sending = [asyncio.create_task(outcomes(one, 10, stream=stream)) for one in (g, other)]
        route = {"route": "/v1/completions", "status": "429"}

        def answered() -> float:
            return sum(one.sample("deltamux_requests_total", **route) for one in (g, other))

        await until(lambda: len(backend.open_calls) + answered() == 20)
        assert len(backend.calls) == 10  # exactly, whichever gateway they came to
        assert backend.hold is not None
        backend.hold.set()
        assert sum(len(refusals(found)) for found in await asyncio.gather(*sending)) == 10


async def left(g: Gateway, *, limit: int) -> int:
    """Tokens that `acme` has left."""
    return (await g.tenancy.buckets.standings("acme", [Share(Kind.TOKENS, limit, 0)]))[Kind.TOKENS].remaining


async def test_a_refused_request_is_told_how_the_limits_stand_and_when_to_return(tmp_path: Path) -> None:
    clock = Clock()
    async with gateway(tmp_path, clock=clock) as g:
        g.limited(tokens_per_min=60, requests_per_min=3)
        raw = await g.openai.completions.with_raw_response.create(
            model=BACKBONE, prompt=PROMPT, max_tokens=47
        )
        shown = {k: v for k, v in raw.headers.items() if k.startswith("x-ratelimit")}
        assert shown == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "20s",
            "x-ratelimit-limit-tokens": "60",
            "x-ratelimit-remaining-tokens": "10",
            "x-ratelimit-reset-tokens": "50s",
        }
        await asyncio.sleep(0)  # 44 come back
        with pytest.raises(openai.RateLimitError) as refused:
            await g.openai.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=57)
        error = refused.value
        assert (error.code, error.type, error.status_code) == ("rate_limit_exceeded", "rate_limit_error", 429)
        headers = error.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"], headers["x-should-retry"]) == (
            "6",
            "6000",
            "true",
        )
        assert headers["x-ratelimit-remaining-tokens"] == "54"
        assert headers["x-ratelimit-remaining-requests"] == "2"  # a refusal costs no request


async def test_requests_per_minute(tmp_path: Path) -> None:
    clock = Clock()
    async with gateway(tmp_path, clock=clock) as g:
        g.limited(requests_per_min=3)
        assert len(refusals(await outcomes(g, 10))) == 7
        clock.now += 19.99
        assert len(refusals(await outcomes(g, 1))) == 1
        clock.now += 0.02
        assert len(refusals(await outcomes(g, 2))) == 1


@pytest.mark.parametrize("counted_in", ["process", "database"])
async def test_concurrency(tmp_path: Path, counted_in: str) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend, clock=Clock(), counted_in=counted_in) as g:
        g.limited(max_concurrency=2, tokens_per_min=1000, requests_per_min=100)
        sending = asyncio.create_task(outcomes(g, 5))
        route = {"route": "/v1/completions", "status": "429"}
        await until(lambda: len(backend.open_calls) + g.sample("deltamux_requests_total", **route) == 5)
        assert len(backend.calls) == 2
        assert backend.hold is not None
        backend.hold.set()
        refused = refusals(await sending)
        assert [error.code for error in refused] == ["rate_limit_exceeded"] * 3
        assert {error.response.headers["retry-after"] for error in refused} == {"1"}
        for _ in range(3):  # one after another: none finds the last one's place taken
            (raw,) = await outcomes(g, 1)
            assert raw.choices
        # the refused ones gave everything back
        async with asyncio.timeout(5):
            while await left(g, limit=1000) != 1000 - 5 * USED:
                await asyncio.sleep(0.005)
        raw = await g.openai.completions.with_raw_response.create(model=BACKBONE, prompt=PROMPT, max_tokens=7)
        assert raw.headers["x-ratelimit-remaining-tokens"] == str(1000 - 5 * USED - 10)
        assert raw.headers["x-ratelimit-remaining-requests"] == "94"


async def test_two_gateways_that_count_in_the_database_share_the_places(tmp_path: Path, url: str) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    options: dict[str, Any] = {"clock": Clock(), "url": url, "counted_in": "database"}
    async with gateway(tmp_path, backend, **options) as g, gateway(tmp_path, backend, **options) as other:
        other.use(g.limited(max_concurrency=3))
        sending = [asyncio.create_task(outcomes(one, 6)) for one in (g, other)]
        route = {"route": "/v1/completions", "status": "429"}

        def answered() -> float:
            return sum(one.sample("deltamux_requests_total", **route) for one in (g, other))

        await until(lambda: len(backend.open_calls) + answered() == 12)
        assert len(backend.calls) == 3
        assert backend.hold is not None
        backend.hold.set()
        assert sum(len(refusals(found)) for found in await asyncio.gather(*sending)) == 9


async def test_the_sdk_waits_as_long_as_it_is_told_and_then_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    pauses = Pauses(monkeypatch, clock)
    async with gateway(tmp_path, clock=clock) as g:
        g.limited(tokens_per_min=60)
        sdk = g.openai.with_options(max_retries=1)
        for _ in range(2):
            made = await sdk.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=57)
            assert made.choices
        assert pauses.lengths == [
            pytest.approx(6.0, abs=0.002)
        ]  # 60 - 6 are left, 60 are needed, 1 comes a second


async def test_the_sdk_does_not_repeat_what_can_never_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    pauses = Pauses(monkeypatch, clock)
    async with gateway(tmp_path, clock=clock) as g:
        g.limited(tokens_per_min=9)
        with pytest.raises(openai.RateLimitError) as refused:
            await g.openai.with_options(max_retries=5).completions.create(
                model=BACKBONE, prompt=PROMPT, max_tokens=7
            )
        assert (refused.value.code, refused.value.param) == ("insufficient_quota", "max_tokens")
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert pauses.lengths == []
        assert g.sample("deltamux_requests_total", route="/v1/completions", status="429") == 1


@pytest.mark.parametrize(
    ("body", "reserved"),
    [
        ({"prompt": PROMPT, "max_tokens": 7}, 10),
        ({"prompt": PROMPT, "max_tokens": 7, "n": 3}, 24),
        ({"prompt": [PROMPT, PROMPT], "max_tokens": 7, "n": 2}, 34),
        ({"prompt": "\u00e9\u00e9", "max_tokens": 7}, 4 + 8 + 7),
        ({"prompt": PROMPT, "max_tokens": 5000}, 64),  # the whole context, whatever is asked for
        ({"messages": [{"role": "user", "content": "hi"}]}, 64),  # as much as the context holds
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}, 6 + 16 + 8 + 2),
    ],
)
async def test_what_is_reserved(tmp_path: Path, body: dict[str, Any], reserved: int) -> None:
    async with gateway(tmp_path, clock=Clock()) as g:
        g.limited(tokens_per_min=1000)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        reply = await g.http.post(path, json={"model": BACKBONE, **body})
        assert reply.status_code == 200, reply.text
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) == 1000 - reserved


def refuse(call: GenerateCall) -> Batches:
    return [(FailureEvent(error=RegistryUnavailable("down").info()),)]


def break_off(call: GenerateCall) -> Batches:
    return [*tokens(call)[:2], RuntimeError("broken")]


@pytest.mark.parametrize(("script", "spent"), [(tokens, 6), (refuse, 0), (break_off, 5)])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_not_used_comes_back(tmp_path: Path, script: Any, spent: int, stream: bool) -> None:
    backend = FakeBackend(script=script)
    async with gateway(tmp_path, backend, clock=Clock()) as g:
        g.limited(tokens_per_min=1000)
        body = {"model": BACKBONE, "prompt": PROMPT, "max_tokens": 500, "stream": stream}
        await g.http.post("/v1/completions", json=body)
        backend.script = tokens
        after = await g.http.post("/v1/completions", json={**body, "max_tokens": 1})
        assert int(after.headers["x-ratelimit-remaining-tokens"]) == 1000 - spent - 4


@pytest.mark.parametrize("counted_in", ["process", "database"])
async def test_a_caller_who_leaves_before_the_first_token_pays_for_its_prompt(
    tmp_path: Path, counted_in: str
) -> None:
    started = asyncio.Event()

    class Slow(FakeBackend):
        async def generate(self, call: GenerateCall) -> Any:
            started.set()
            await asyncio.Event().wait()
            yield ()

    async with gateway(tmp_path, Slow(), clock=Clock(), counted_in=counted_in) as g:
        g.limited(tokens_per_min=1000, max_concurrency=1)
        body = {"model": BACKBONE, "prompt": PROMPT, "max_tokens": 50}
        sending = asyncio.create_task(post_and_leave(g, body, started))
        await sending
        g.backend.generate = FakeBackend().generate  # type: ignore[method-assign]
        async with asyncio.timeout(5):  # all but the prompt comes back
            while await left(g, limit=1000) != 1000 - 3:
                await asyncio.sleep(0.005)
        after = await g.http.post("/v1/completions", json={**body, "max_tokens": 1})
        assert after.status_code == 200  # its place is free again
        assert int(after.headers["x-ratelimit-remaining-tokens"]) == 1000 - 3 - 4


async def test_a_caller_who_leaves_while_it_is_counted_gets_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path, clock=Clock()) as g:
        g.limited(tokens_per_min=1000, requests_per_min=10)
        counting, counted, take = asyncio.Event(), asyncio.Event(), g.tenancy.buckets.take

        async def slowly(tenant: str, shares: Sequence[Share]) -> Any:
            counting.set()
            await counted.wait()
            return await take(tenant, shares)

        monkeypatch.setattr(g.tenancy.buckets, "take", slowly)
        await post_and_leave(g, {"model": BACKBONE, "prompt": PROMPT, "max_tokens": 50}, counting)
        counted.set()
        monkeypatch.undo()
        for _ in range(5):
            await asyncio.sleep(0)
        reply = await g.http.post(
            "/v1/completions", json={"model": BACKBONE, "prompt": PROMPT, "max_tokens": 1}
        )
        assert reply.headers["x-ratelimit-remaining-tokens"] == "996"
        assert reply.headers["x-ratelimit-remaining-requests"] == "9"


async def post_and_leave(g: Gateway, body: dict[str, Any], begun: asyncio.Event) -> None:
    """Send a request through the application itself, and disconnect once it has begun."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    headers = {"content-type": "application/json", "authorization": g.http.headers["authorization"]}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "server": ("gateway", 80),
        "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await g.app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_bound_on_a_text_holds_only_until_its_tokens_are_known(
    tmp_path: Path, stream: bool
) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend, clock=Clock()) as g:
        g.limited(tokens_per_min=1000)
        text = "x" * 40  # a bound of 48; it comes to 3 tokens
        body = {"model": BACKBONE, "prompt": [text, text], "max_tokens": 7, "stream": stream}
        sending = asyncio.create_task(g.http.post("/v1/completions", json=body))
        async with asyncio.timeout(5):
            while await left(g, limit=1000) != 1000 - 2 * (3 + 7):
                await asyncio.sleep(0.005)
        assert backend.hold is not None
        backend.hold.set()
        assert (await sending).headers["x-ratelimit-remaining-tokens"] == str(1000 - 2 * (48 + 7))
        async with asyncio.timeout(5):
            while await left(g, limit=1000) != 1000 - 2 * USED:
                await asyncio.sleep(0.005)


async def test_the_order_of_refusals(tmp_path: Path) -> None:
    async with gateway(tmp_path, clock=Clock()) as g:
        g.limited(requests_per_min=1, tokens_per_min=8, max_concurrency=1)
        big: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 50}

        async def code(model: str, **body: Any) -> str:
            reply: httpx.Response = await g.http.post("/v1/completions", json={"model": model, **body})
            return str(reply.json().get("error", {}).get("code", "passed"))

        assert await code("absent", **big) == "model_not_found"  # before any limit
        assert await code(BACKBONE, **big) == "insufficient_quota"
        assert await code(BACKBONE, prompt=PROMPT, max_tokens=5) == "passed"
        assert await code(BACKBONE, **big) == "rate_limit_exceeded"  # requests before tokens
        assert await code("absent", **big) == "model_not_found"
        del g.http.headers["authorization"]
        assert await code("absent", **big) == "invalid_api_key"


async def test_tenants_limits_are_their_own(tmp_path: Path) -> None:
    async with gateway(tmp_path, clock=Clock()) as g:
        acme, other = g.limited(requests_per_min=1), g.key("other")
        second = g.key("acme")
        for key, passes in ((acme, True), (second, False), (other, True), (other, True)):
            g.use(key)
            assert bool(refusals(await outcomes(g, 1))) != passes


async def test_a_limit_that_can_not_be_counted_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as g:
        g.limited(requests_per_min=1)

        async def fail(tenant: str, shares: Sequence[Share]) -> Any:
            raise RegistryUnavailable("The registry's database is locked.")

        monkeypatch.setattr(g.tenancy.buckets, "take", fail)
        monkeypatch.setattr(g.tenancy.buckets, "standings", fail)
        assert_envelope(await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": "x"}), 503)
        assert g.backend.calls == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waits_too_long_for_its_turn_is_told_to_return(
    tmp_path: Path, stream: bool
) -> None:
    class Full(FakeBackend):
        async def generate(self, call: GenerateCall) -> Any:
            if call.request_id.endswith("-0"):
                for batch in tokens(call):
                    yield batch
            await asyncio.Event().wait()

    async with gateway(tmp_path, Full(), first_token_timeout_s=0.05) as g:
        body = {"model": BACKBONE, "prompt": PROMPT, "n": 2, "stream": stream}
        reply = await g.http.post("/v1/completions", json=body)
        assert_envelope(reply, 429)
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert reply.headers["retry-after"] == "1"
        alone = await g.http.post("/v1/completions", json={**body, "n": 1})
        assert alone.status_code == 200


async def test_a_request_that_would_wait_in_vain_is_told_when_to_return_and_costs_nothing(
    tmp_path: Path,
) -> None:
    def refuse(call: GenerateCall) -> Batches:
        assert call.max_wait_s == 5.0
        return [(FailureEvent(error=Overloaded("Full.", retry_after_s=2.3).info()),)]

    async with gateway(tmp_path, FakeBackend(script=refuse), clock=Clock(), first_token_timeout_s=5.0) as g:
        g.limited(tokens_per_min=100)
        with pytest.raises(openai.RateLimitError) as refused:
            await g.openai.completions.create(model=BACKBONE, prompt=PROMPT, max_tokens=7)
        headers = refused.value.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2300")
        assert refused.value.code == "rate_limit_exceeded"
        await asyncio.sleep(0)
        assert await left(g, limit=100) == 100
