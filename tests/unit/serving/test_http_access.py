"""Who may call what: default deny, scopes, globs, grants, and that the invisible looks like the unknown."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from prometheus_client import CollectorRegistry

from adapters.registry import Registry
from serving.config import Auth, Backbone, Database, Server, Settings
from serving.deployments.administration import answering
from serving.deployments.ports import bound_socket
from serving.http.access import PUBLIC, declared_scopes, require_declared
from serving.http.app import create_admin_app
from serving.http.bodies import json_route
from serving.metrics import GatewayMetrics
from serving.tenancy.keys import make_key
from serving.tenancy.principal import Scope
from serving.tenancy.tenancy import Tenancy
from tests.unit.serving.http_support import BACKBONE, Gateway, gateway, listening, pair, until
from tests.unit.serving.test_http_errors import assert_envelope

WRONG = "dmx_0123456789abcdef_" + "0" * 64
PARAMETERS = {"version": "1"}
"""What a path's parameters are in the walk where their own names do not do."""


@pytest.fixture
async def g(tmp_path: Path, url: str) -> AsyncIterator[Gateway]:
    """A gateway that has keys: an administrator's in use, and the delta `acme/private`."""
    async with gateway(tmp_path, url=url) as made:
        made.use(made.key("acme"))
        assert (await made.push("private")).status_code == 201
        made.use(made.key("default", Scope.ADMIN))
        yield made


# -- routes ----------------------------------------------------------------------------------------------------


async def test_every_route_declares_its_scopes_or_is_public(g: Gateway) -> None:
    contexts = list(iter_route_contexts(g.app.routes))
    assert {item.path for item in contexts if not declared_scopes(item.original_route)} == set(PUBLIC)
    assert len(guarded(g.app)) > 20
    assert {scopes for _, path, scopes in guarded(g.app) if path.startswith("/v1/admin")} == {(Scope.ADMIN,)}


async def test_the_description_says_which_routes_take_a_key(g: Gateway) -> None:
    paths = (await g.http.get("/openapi.json")).json()["paths"]
    without = {path for path, item in paths.items() if not all("security" in op for op in item.values())}
    assert without == set(PUBLIC) & set(paths)


def test_an_application_with_an_undeclared_route_is_not_made() -> None:
    app = FastAPI()
    require_declared(app)

    @app.get("/v1/open")
    def forgotten() -> None: ...

    with pytest.raises(ValueError, match="/v1/open"):
        require_declared(app)


async def test_a_router_refuses_an_undeclared_route(g: Gateway) -> None:
    route_class = next(
        type(item.original_route)
        for item in iter_route_contexts(g.app.routes)
        if item.path == "/v1/completions"
    )
    assert route_class.__qualname__.startswith(json_route.__name__)
    router = APIRouter(route_class=route_class)
    with pytest.raises(ValueError, match="without scopes"):

        @router.get("/v1/open")
        def forgotten() -> None: ...


def guarded(app: FastAPI) -> list[tuple[str, str, tuple[Scope, ...]]]:
    """(method, path with something for each parameter, scopes) of every route that is not public."""
    return [
        (
            method,
            re.sub(r"{(\w+)(:\w+)?}", lambda found: PARAMETERS.get(found[1], found[1]), str(item.path)),
            declared_scopes(item.original_route) or (),
        )
        for item in iter_route_contexts(app.routes)
        for method in sorted(item.methods or ())
        if item.path not in PUBLIC
    ]


@pytest.fixture(params=["all", "without administration", "administration"])
async def walked(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Gateway, FastAPI]]:
    """A gateway that has keys, and the application whose routes are walked; its clients call that one."""
    server = Server() if request.param == "all" else Server(admin_port=0)
    async with gateway(tmp_path, server=server) as g:
        g.key("acme", Scope.ADMIN)
        if request.param != "administration":
            yield g, g.app
            return
        app = admin_app(g, tmp_path)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://admin") as http:
            yield replace(g, http=http), app


def admin_app(g: Gateway, tmp_path: Path) -> FastAPI:
    settings = Settings(backbone=Backbone(path=BACKBONE))
    return create_admin_app(tenancy=g.tenancy, settings=settings, metrics=GatewayMetrics(CollectorRegistry()))


async def test_administration_on_a_port_of_its_own_is_nowhere_else(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        everything = guarded(g.app)
    async with gateway(tmp_path, server=Server(admin_port=0)) as g:
        apart, admin = guarded(g.app), guarded(admin_app(g, tmp_path))
        assert sorted([*apart, *admin]) == sorted(everything)
        assert {path.startswith("/v1/admin") for _, path, _ in apart} == {False}
        assert {path.startswith("/v1/admin") for _, path, _ in admin} == {True}
        g.use(g.key("acme", Scope.ADMIN))
        for method, path, _ in admin:
            reply = await g.http.request(method, path, json={})
            unknown = await g.http.request(method, "/v1/nothing", json={})
            assert_envelope(reply, 404)
            assert reply.text == unknown.text


def test_administration_answers_on_its_socket(tmp_path: Path) -> None:
    settings = Settings(
        backbone=Backbone(path=BACKBONE),
        server=Server(admin_port=0),
        database=Database(url=f"sqlite:///{tmp_path}/registry.db"),
        auth=Auth(secret_file=tmp_path / "secret"),
    )
    with bound_socket("127.0.0.1", 0) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/admin/tenants"
        with answering(settings, bound), httpx.Client() as http:
            assert [item["id"] for item in http.get(url).json()["data"]] == ["default"]
            with Tenancy(settings) as tenancy:
                tenancy.keys.create("default", [Scope.ADMIN], actor="test")
            assert http.get(url).status_code == 401
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    assert not [thread for thread in threading.enumerate() if thread.name == "administration"]


async def test_without_a_valid_key_every_route_answers_401(walked: tuple[Gateway, FastAPI]) -> None:
    g, app = walked
    g.http.headers.pop("authorization", None)
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic eDp5",
        f"Bearer {WRONG}_00000000",
        f"Bearer {make_key().text}",
    ):
        headers = {} if header is None else {"authorization": header}
        for method, path, _ in guarded(app):
            reply = await g.http.request(method, path, headers=headers, content=b"{not json")
            assert_envelope(reply, 401)
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        for path in {str(item.path) for item in iter_route_contexts(app.routes)} & set(PUBLIC):
            assert (await g.http.get(path, headers=headers)).status_code == 200


async def test_a_key_reaches_the_routes_of_its_scope_and_no_other(walked: tuple[Gateway, FastAPI]) -> None:
    g, app = walked
    keys = {scope: g.key("acme", scope) for scope in Scope}
    for scope, (method, path, scopes) in product(Scope, guarded(app)):
        g.use(keys[scope])
        reply = await g.http.request(method, path, json={})
        if scope in scopes or scope is Scope.ADMIN:
            assert reply.status_code not in (401, 403), (method, path)
        else:
            assert_envelope(reply, 403)
            assert reply.json()["error"]["code"] == "insufficient_permissions"


async def test_other_methods_of_a_route_are_refused_with_and_without_a_key(
    walked: tuple[Gateway, FastAPI],
) -> None:
    g, app = walked
    known: dict[str, set[str]] = {}
    for method, path, _ in guarded(app):
        known.setdefault(path, set()).add(method)
    for key in (None, g.key("acme", Scope.ADMIN)):
        g.http.headers.pop("authorization", None)
        if key is not None:
            g.use(key)
        for path, methods in known.items():
            for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
                reply = await g.http.request(method, path)
                assert reply.status_code in (404, 405), (method, path)


async def test_a_body_is_not_read_from_a_caller_without_a_key(g: Gateway) -> None:
    async with listening(g.app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 4000000\r\nexpect: 100-continue\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")  # and no "100 Continue" before it
        writer.close()


# -- keys ------------------------------------------------------------------------------------------------------


async def test_before_the_first_key_everything_is_open_and_after_it_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert (await g.push("delta")).status_code == 201
        made = await g.http.post("/v1/admin/keys", json={"tenant": "default", "scopes": ["admin"]})
        assert made.status_code == 201
        assert (await g.http.get("/v1/models")).status_code == 401
        g.use(made.json()["key"])
        assert (await g.http.get("/v1/models")).status_code == 200
        await g.http.delete(f"/v1/admin/keys/{made.json()['id']}")
        assert (await g.http.get("/v1/models")).status_code == 401  # the last key is gone; it stays closed


async def test_a_key_is_shown_once(g: Gateway) -> None:
    body = {"tenant": "acme", "scopes": ["infer"], "adapters": ["a-*"], "label": "bot", "expires_in_s": 60}
    reply = await g.http.post("/v1/admin/keys", json=body)
    made = reply.json()
    assert reply.headers["cache-control"] == "no-store"
    assert (made["tenant"], made["scopes"], made["adapters"], made["label"]) == (
        "acme",
        ["infer"],
        ["a-*"],
        "bot",
    )
    listed = (await g.http.get("/v1/admin/keys", params={"tenant": "acme"})).json()["data"]
    assert [item["id"] for item in listed][-1] == made["id"]
    secret = made["key"].split("_")[2]
    assert secret not in str(listed)


async def test_rotation_over_http(g: Gateway) -> None:
    old = (await g.http.post("/v1/admin/keys", json={"tenant": "acme", "scopes": ["infer"]})).json()
    new = (await g.http.post(f"/v1/admin/keys/{old['id']}/rotate", json={"overlap_s": 3600})).json()
    cut = (await g.http.post(f"/v1/admin/keys/{new['id']}/rotate", json={"overlap_s": 0})).json()
    statuses = []
    for key in (old, new, cut):
        g.use(key["key"])
        statuses.append((await g.http.get("/v1/models")).status_code)
    assert statuses == [200, 401, 200]


async def test_keys_rotate_under_load_without_a_failed_request_and_end_at_once_in_every_gateway(
    tmp_path: Path, url: str
) -> None:
    async with gateway(tmp_path, url=url) as g, gateway(tmp_path, url=url) as other:
        g.use(g.key("default", Scope.ADMIN))
        body = {"tenant": "default", "scopes": ["infer"]}
        made = (await g.http.post("/v1/admin/keys", json=body)).json()
        keys = [made["key"]] * 8
        statuses: Counter[int] = Counter()
        loaded = True

        async def ask(one: Gateway, key: str) -> int:
            body, headers = {"model": BACKBONE, "prompt": [1]}, {"authorization": f"Bearer {key}"}
            return (await one.http.post("/v1/completions", json=body, headers=headers)).status_code

        async def client(number: int) -> None:
            while loaded:
                statuses[await ask((g, other)[number % 2], keys[number])] += 1

        async with asyncio.TaskGroup() as clients:
            for number in range(len(keys)):
                clients.create_task(client(number))
            for _ in range(3):
                path = f"/v1/admin/keys/{made['id']}/rotate"
                made = (await g.http.post(path, json={"overlap_s": 60})).json()
                for number in range(len(keys)):  # its users change over one after another
                    keys[number] = made["key"]
                    before = statuses.total()
                    while statuses.total() < before + 4:
                        await asyncio.sleep(0.001)
            loaded = False
        assert set(statuses) == {200}
        assert statuses.total() > 90

        waiting = other.backend.hold = asyncio.Event()
        begun = asyncio.create_task(ask(other, made["key"]))
        await until(lambda: bool(other.backend.open_calls))
        assert (await g.http.delete(f"/v1/admin/keys/{made['id']}")).status_code == 200
        assert [await ask(one, made["key"]) for one in (other, g)] == [401, 401]  # from the next request on
        waiting.set()
        assert await begun == 200  # what had begun ends as it began


async def test_a_disabled_tenants_keys_are_refused(g: Gateway) -> None:
    key = g.key("acme")
    path, headers = "/v1/admin/tenants/acme/state", {"authorization": f"Bearer {key}"}
    assert (await g.http.put(path, json={"disabled": True})).json()["disabled"] is True
    assert (await g.http.get("/v1/models", headers=headers)).status_code == 401
    await g.http.put(path, json={"disabled": False})
    assert (await g.http.get("/v1/models", headers=headers)).status_code == 200


# -- tenants ---------------------------------------------------------------------------------------------------


async def test_tenants_and_their_limits(g: Gateway) -> None:
    made = await g.http.post("/v1/admin/tenants", json={"name": "initech", "tokens_per_min": 100})
    assert (made.status_code, made.json()["tokens_per_min"]) == (201, 100)
    again = await g.http.post("/v1/admin/tenants", json={"name": "initech"})
    assert_envelope(again, 409, "tenant")
    limits = {"requests_per_min": 5, "weight": 2.0, "service_class": "batch"}
    changed = (await g.http.put("/v1/admin/tenants/initech/limits", json=limits)).json()
    assert changed == made.json() | limits | {"tokens_per_min": None}
    assert (await g.http.get("/v1/admin/tenants/initech")).json() == changed
    names = [item["id"] for item in (await g.http.get("/v1/admin/tenants")).json()["data"]]
    assert names == ["acme", "default", "initech"]


async def test_refusals(g: Gateway) -> None:
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("/v1/admin/tenants", {"name": "No Name!"}, 400),
        ("/v1/admin/tenants", {"name": "x", "requests_per_min": 0}, 400),
        ("/v1/admin/tenants", {"name": "x", "weight": 1000}, 400),
        ("/v1/admin/tenants", {"name": "x", "service_class": "urgent"}, 400),
        ("/v1/admin/keys", {"tenant": "absent", "scopes": ["infer"]}, 404),
        ("/v1/admin/keys", {"tenant": "acme", "scopes": []}, 400),
        ("/v1/admin/keys", {"tenant": "acme", "scopes": ["root"]}, 400),
        ("/v1/admin/keys", {"tenant": "acme", "scopes": ["infer"], "adapters": ["(a+)+"]}, 400),
        ("/v1/admin/keys", {"tenant": "acme", "scopes": ["infer"], "label": "a\nb"}, 400),
        ("/v1/admin/keys/0123456789abcdef/rotate", {}, 404),
    ]
    for path, body, status in cases:
        reply = await g.http.post(path, json=body)
        assert reply.status_code == status, (path, body, reply.text)


async def test_the_tenant_and_its_standing_reach_the_backend(g: Gateway) -> None:
    limits = {"weight": 2.5, "service_class": "realtime"}
    await g.http.put("/v1/admin/tenants/acme/limits", json=limits)
    g.use(g.key("acme"))
    await g.openai.completions.create(model="private", prompt="hi")
    (call,) = g.backend.calls
    assert (call.tenant, call.weight, call.service_class) == ("acme", 2.5, "realtime")


# -- what is visible -------------------------------------------------------------------------------------------


async def test_tenants_have_names_of_their_own(g: Gateway) -> None:
    g.use(g.key("globex"))
    assert (await g.push("private", seed=5)).json()["digest"] != ""
    digests = {}
    for tenant in ("acme", "globex"):
        g.use(g.key(tenant))
        raw = await g.openai.completions.with_raw_response.create(model="private", prompt="hi")
        digests[tenant] = raw.headers["x-adapter-digest"]
        assert {m.owned_by for m in (await g.openai.models.list()).data} == {"deltamux", tenant}
    assert digests["acme"] != digests["globex"]


class Counting(Registry):
    """A registry that counts what is looked up."""

    looked_up = 0

    def resolve(self, *args: Any, **options: Any) -> Any:
        type(self).looked_up += 1
        return super().resolve(*args, **options)


@pytest.mark.parametrize("pin", ["", ":latest", "@v1", "@sha256:" + "0" * 64])
async def test_an_invisible_delta_is_answered_exactly_like_an_unknown_one(tmp_path: Path, pin: str) -> None:
    async with gateway(tmp_path, registry_type=Counting) as g:
        g.use(g.key("acme"))
        await g.push("hidden-1")
        g.use(g.key("globex"))
        Counting.looked_up = 0
        replies: list[httpx.Response] = []
        for name in ("hidden-1", "absent-1"):
            body = {"model": f"acme/{name}{pin}", "prompt": "hi"}
            reply = await g.http.post("/v1/completions", json=body, headers={"x-request-id": "same"})
            assert_envelope(reply, 404, "model")
            replies.append(reply)
        first, second = replies
        assert first.text.replace("hidden-1", "absent-1") == second.text
        assert first.headers == second.headers
        assert Counting.looked_up == 0  # neither costs a look at the deltas: no time tells them apart
        with pytest.raises(openai.NotFoundError):
            await g.openai.models.retrieve(f"acme/hidden-1{pin}")
        assert g.backend.calls == []


async def test_grants_make_a_delta_usable_by_its_full_name_and_nothing_else(g: Gateway) -> None:
    owner, other, third = g.key("acme"), g.key("globex"), g.key("initech")

    async def who_can_use_it() -> list[bool]:
        able = []
        for key in (other, third):
            g.use(key)
            reply = await g.http.post("/v1/completions", json={"model": "acme/private", "prompt": "hi"})
            listed = {item["id"] for item in (await g.http.get("/v1/models")).json()["data"]}
            assert (reply.status_code == 200) == ("acme/private" in listed)
            able.append(reply.status_code == 200)
        g.use(owner)
        return able

    assert await who_can_use_it() == [False, False]
    path = "/v1/adapters/private/grants"
    assert (await g.http.put(f"{path}/globex")).status_code == 200
    assert (await g.http.put(f"{path}/globex")).status_code == 200
    assert await who_can_use_it() == [True, False]
    assert (await g.http.put(f"{path}/*")).status_code == 200
    assert await who_can_use_it() == [True, True]
    assert [item["tenant"] for item in (await g.http.get(path)).json()["data"]] == ["*", "globex"]
    assert (await g.http.delete(f"{path}/*")).json()["deleted"] is True
    assert_envelope(await g.http.delete(f"{path}/*"), 404, "tenant")
    assert await who_can_use_it() == [True, False]

    g.use(other)  # using is not managing
    for request in (
        ("DELETE", "/v1/adapters/private"),
        ("PUT", f"{path}/initech"),
        ("GET", "/v1/adapters/private"),
    ):
        assert_envelope(await g.http.request(*request), 404, "name")

    g.use(owner)  # a name that is used again was never shared
    await g.http.delete("/v1/adapters/private")
    await g.push("private", seed=3)
    assert await who_can_use_it() == [False, False]


@pytest.mark.parametrize("tenant", ["acme", "No!"])
async def test_a_grant_needs_a_grantee(g: Gateway, tenant: str) -> None:
    g.use(g.key("acme"))
    assert_envelope(await g.http.put(f"/v1/adapters/private/grants/{tenant}"), 400, "tenant")


async def test_a_grant_does_not_tell_which_tenants_exist(g: Gateway) -> None:
    g.key("globex")
    g.use(g.key("acme"))
    path, sent = "/v1/adapters/private/grants", {"x-request-id": "same"}
    for method in ("PUT", "DELETE", "DELETE"):  # granted, withdrawn, and there is none
        known, unknown = [
            await g.http.request(method, f"{path}/{name}", headers=sent) for name in ("globex", "absent")
        ]
        assert known.status_code == unknown.status_code
        assert known.text.replace("globex", "absent") == unknown.text
    assert unknown.status_code == 404
    await g.http.put(f"{path}/later")
    g.use(g.key("later"))  # the name was meant, whoever bears it
    assert (
        await g.http.post("/v1/completions", json={"model": "acme/private", "prompt": "x"})
    ).status_code == 200


async def test_grants_of_a_delta_are_bounded(g: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenancy.grants.MAX_GRANTS", 2)
    g.use(g.key("acme"))
    path = "/v1/adapters/private/grants"
    statuses = [(await g.http.put(f"{path}/{name}")).status_code for name in ("one", "two", "one", "three")]
    assert statuses == [200, 200, 200, 400]


async def test_identical_grants_at_once_are_one(g: Gateway) -> None:
    g.use(g.key("acme"))
    path = "/v1/adapters/private/grants"
    replies = await asyncio.gather(*(g.http.put(f"{path}/globex") for _ in range(16)))
    assert {reply.status_code for reply in replies} == {200}
    assert len((await g.http.get(path)).json()["data"]) == 1
    lines = [line for line in g.tenancy.audit_lines(limit=100) if line.action == "grant.create"]
    assert len(lines) == 1


async def test_globs_narrow_a_key(g: Gateway) -> None:
    g.use(g.key("acme"))
    for seed, name in enumerate(("team-a.x", "team-a.y", "team-b.x")):
        await g.push(name, seed=seed + 10)
    g.use(g.key("acme", Scope.INFER, Scope.UPLOAD, Scope.MANAGE, adapters=["team-a.*"]))
    assert [m.id for m in (await g.openai.models.list()).data] == [BACKBONE, "team-a.x", "team-a.y"]
    page = (await g.http.get("/v1/adapters", params={"limit": 1, "after": "team-a.x"})).json()
    assert ([item["id"] for item in page["data"]], page["last_id"]) == (["team-a.y"], "team-a.y")
    await g.openai.completions.create(model="team-a.x", prompt="hi")
    with pytest.raises(openai.NotFoundError) as hidden:
        await g.openai.completions.create(model="team-b.x", prompt="hi")
    with pytest.raises(openai.NotFoundError) as absent:
        await g.openai.completions.create(model="team-b.q", prompt="hi")
    assert str(hidden.value).replace("team-b.x", "team-b.q") == str(absent.value)
    assert_envelope(await g.http.delete("/v1/adapters/team-b.x"), 404, "name")
    refused = await g.http.put("/v1/adapters/team-b.x/versions", files=pair(20))
    assert_envelope(refused, 403, "name")


async def test_an_upload_may_be_longer_than_a_json_body(g: Gateway) -> None:
    files = [("file", ("manifest.json", b"x" * (9 << 20)))]
    g.use(g.key("acme"))
    reply = await g.http.put("/v1/adapters/long/versions", files=files)
    assert reply.json()["error"]["code"] == "invalid_adapter"  # it was read, and judged
