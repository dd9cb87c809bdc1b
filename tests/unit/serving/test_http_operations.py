"""Health, metrics and the API's own description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import RegistryUnavailable, Unavailable
from adapters.registry import Registry
from serving.http.openapi import ErrorBody
from serving.metrics import EngineMetrics, families
from tests.unit.serving.http_support import BACKBONE, FakeBackend, gateway
from tests.unit.serving.test_http_errors import assert_envelope


async def test_healthy(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.http.get("/health/live")).json() == {"status": "live"}
        assert (await g.http.get("/health/ready")).json() == {"status": "ready"}


class NoPing(Registry):
    """A registry whose database is away."""

    def ping(self) -> None:
        raise RegistryUnavailable("The registry's database is locked.")


@pytest.mark.parametrize(
    ("backend", "parts"),
    [
        (FakeBackend(heartbeat_s=31.0), {}),
        (FakeBackend(heartbeat_s=float("nan")), {}),
        (FakeBackend(failure=Unavailable("No replica answers.")), {}),
        (FakeBackend(), {"registry_type": NoPing}),
    ],
)
async def test_not_ready(tmp_path: Path, backend: FakeBackend, parts: dict[str, Any]) -> None:
    async with gateway(tmp_path, backend, **parts) as g:
        reply = await g.http.get("/health/ready")
        assert_envelope(reply, 503)
        assert (await g.http.get("/health/live")).status_code == 200


async def test_metrics_of_gateway_and_replicas_are_one_page(tmp_path: Path) -> None:
    replicas = []
    for index in range(2):
        registry = CollectorRegistry()
        EngineMetrics(registry).requests_running.set(index + 1)
        replicas.append(({"replica": str(index)}, families(registry)))
    async with gateway(tmp_path, FakeBackend(scraped=replicas)) as g:
        await g.openai.completions.create(model=BACKBONE, prompt="hi")
        reply = await g.http.get("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        found = {family.name: family for family in text_string_to_metric_families(reply.text)}
        running = {s.labels["replica"]: s.value for s in found["vllm:num_requests_running"].samples}
        assert running == {"0": 1.0, "1": 2.0}
        counted = {
            s.labels["route"]: s.value for s in found["deltamux_requests"].samples if "route" in s.labels
        }
        assert counted["/v1/completions"] == 1.0
        assert reply.text.count("# TYPE vllm:num_requests_running gauge\n") == 1


async def test_metrics_without_replicas(tmp_path: Path) -> None:
    async with gateway(tmp_path, FakeBackend(failure=Unavailable("gone"))) as g:
        reply = await g.http.get("/metrics")
        assert reply.status_code == 200
        assert "deltamux_scrape_failures_total 1.0" in reply.text


async def test_docs_describe_every_route(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.http.get("/docs")).status_code == 200
        description = (await g.http.get("/openapi.json")).json()
        assert {"CompletionBody", "ChatBody", "AliasBody"} <= set(description["components"]["schemas"])
        operations = [op for path in description["paths"].values() for op in path.values()]
        routes = [
            item for item in iter_route_contexts(g.app.routes) if isinstance(item.original_route, APIRoute)
        ]
        assert len(operations) == len(routes)
        assert all(op["description"] for op in operations)


async def test_docs_name_the_errors_that_there_are(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        description = (await g.http.get("/openapi.json")).json()
        assert "422" not in json.dumps(description)
        for path, item in description["paths"].items():
            for method, operation in item.items():
                errors = {status: body for status, body in operation["responses"].items() if status >= "400"}
                assert "503" in errors, f"{method} {path}"
                assert ("401" in errors) is ("security" in operation), f"{method} {path}"
                for body in errors.values():
                    schema = body["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}
        shown = (await g.http.get("/v1/models/none")).json()
        assert ErrorBody.model_validate(shown, extra="forbid").error.code == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_docs_name_both_types_of_an_answer_that_may_be_streamed(tmp_path: Path, path: str) -> None:
    async with gateway(tmp_path) as g:
        content = (await g.http.get("/openapi.json")).json()["paths"][path]["post"]["responses"]["200"][
            "content"
        ]
        prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
        for stream, kind in ((True, "text/event-stream"), (False, "application/json")):
            body = {"model": BACKBONE, "max_tokens": 1, "stream": stream, **prompt}
            reply = (await g.http.post(path, json=body)).raise_for_status()
            assert reply.headers["content-type"].partition(";")[0] == kind
        assert set(content) == {"application/json", "text/event-stream"}
        assert content["text/event-stream"]["itemSchema"]["required"] == ["data"]


async def test_the_sdk_does_not_repeat_a_lost_swap(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        sdk = g.openai.with_options(max_retries=3)
        with pytest.raises(openai.ConflictError):
            await sdk.put(
                "/adapters/delta/aliases/a", body={"version": 1, "expected_revision": 7}, cast_to=object
            )
        route = "/v1/adapters/{name}/aliases/{alias}"
        assert g.sample("deltamux_requests_total", route=route, status="409") == 1
