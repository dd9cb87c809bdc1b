"""Keys, tenants and what a principal reaches, with a clock that the tests move."""

from __future__ import annotations

import re
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from adapters.errors import Conflict, InvalidRequest, NotFound, Unauthenticated, Unavailable
from adapters.migrations.access import api_keys
from adapters.migrations.database import Database as Opened
from adapters.migrations.schema import metadata
from adapters.registry import Registry
from serving.config import Auth, Backbone, Database, Server, Settings
from serving.deployments.app import check_exposure
from serving.tenancy.keys import hash_of, id_of, make_key, read_secret
from serving.tenancy.principal import Limits, Principal, Scope, check_globs
from serving.tenancy.tenancy import Tenancy
from tests.unit.adapters.test_registry import publish
from tests.unit.serving.http_support import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path, url: str) -> Settings:
    return Settings(
        backbone=Backbone(path="none"),
        database=Database(url=url),
        auth=Auth(secret_file=tmp_path / "secret"),
    )


@pytest.fixture
def tenancy(settings: Settings, clock: Clock) -> Iterator[Tenancy]:
    with Tenancy(settings, clock=clock) as made:
        yield made


# -- the text of a key -----------------------------------------------------------------------------------------


def test_a_key_has_256_random_bits_and_names_itself() -> None:
    keys = [make_key() for _ in range(50)]
    assert all(re.fullmatch(r"dmx_[0-9a-f]{16}_[0-9a-f]{64}_[0-9a-f]{8}", key.text) for key in keys)
    assert all(id_of(key.text) == key.id for key in keys)
    assert len({key.text for key in keys}) == len({key.id for key in keys}) == 50
    assert keys[0].text not in repr(keys[0])


@given(st.integers(0, 93), st.characters(codec="utf-8"))
def test_the_checksum_sees_a_typing_error(place: int, letter: str) -> None:
    text = make_key().text
    assert len(text) == 94
    wrong = text[:place] + letter + text[place + 1 :]
    assert id_of(wrong) is None or wrong == text


@given(st.text(max_size=120))
def test_other_texts_are_no_keys(text: str) -> None:
    assert id_of(text) is None


# -- the secret ------------------------------------------------------------------------------------------------


def test_the_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "secret"
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(read_secret, [file] * 16))
    assert len(secrets) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_a_secret_that_is_no_secret_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(Unavailable, match="at least 32"):
        read_secret(tmp_path / "short")
    with pytest.raises(Unavailable, match="can't be used"):
        read_secret(tmp_path)


def test_another_secret_makes_every_key_invalid(settings: Settings, tenancy: Tenancy) -> None:
    _, made = tenancy.keys.create("default", [Scope.INFER], actor="test")
    settings.auth.secret_file.write_text("x" * 64)
    with Tenancy(settings) as other, pytest.raises(Unauthenticated):
        other.caller(made.text)


# -- keys ------------------------------------------------------------------------------------------------------


def test_who_shows_a_key_is_its_tenant_with_its_scopes(tenancy: Tenancy) -> None:
    limits = Limits(requests_per_min=5, tokens_per_min=6, max_concurrency=7, weight=0.5)
    tenancy.tenants.create("acme", limits, actor="test")
    scopes = [Scope.UPLOAD, Scope.INFER]
    record, made = tenancy.keys.create("acme", scopes, adapters=["a-*"], label="bot", actor="test")
    assert tenancy.caller(made.text) == Principal(
        tenant="acme",
        key_id=record.id,
        scopes=frozenset(scopes),
        globs=("a-*",),
        limits=limits,
    )


def test_a_wrong_key_with_a_known_id_and_checksum_is_refused_like_an_unknown_one(tenancy: Tenancy) -> None:
    _, made = tenancy.keys.create("default", [Scope.INFER], actor="test")
    other = make_key()
    body = f"dmx_{made.id}_{other.text.split('_')[2]}"
    forged = f"{body}_{zlib.crc32(body.encode()):08x}"
    assert id_of(forged) == made.id
    messages = set()
    for text in (forged, other.text):
        with pytest.raises(Unauthenticated) as refused:
            tenancy.caller(text)
        messages.add(str(refused.value))
    assert len(messages) == 1


def test_a_key_that_makes_keys_can_not_be_narrowed(tenancy: Tenancy) -> None:
    with pytest.raises(InvalidRequest, match="reaches every delta"):
        tenancy.keys.create("default", [Scope.INFER, Scope.ADMIN], adapters=["a-*"], actor="test")


def test_a_key_ends(tenancy: Tenancy, clock: Clock) -> None:
    _, made = tenancy.keys.create("default", [Scope.INFER], lifetime_s=60, actor="test")
    clock.now += 59.9
    tenancy.caller(made.text)
    clock.now += 0.1
    with pytest.raises(Unauthenticated, match="expired"):
        tenancy.caller(made.text)


def test_a_revoked_key_is_refused_at_once_and_for_ever(tenancy: Tenancy) -> None:
    record, made = tenancy.keys.create("default", [Scope.INFER], actor="test")
    first = tenancy.keys.revoke(record.id, actor="test")
    assert tenancy.keys.revoke(record.id, actor="test") == first
    with pytest.raises(Unauthenticated, match="revoked"):
        tenancy.caller(made.text)
    with pytest.raises(Unauthenticated):
        tenancy.caller(None)


def test_rotation_overlaps_and_keeps_what_the_key_may_do(tenancy: Tenancy, clock: Clock) -> None:
    record, old = tenancy.keys.create(
        "default", [Scope.MANAGE], adapters=["x"], label="l", lifetime_s=1000, actor="test"
    )
    clock.now += 400
    successor, new = tenancy.keys.rotate(record.id, overlap_s=100, actor="test")
    assert successor.expires_at == clock.now + 1000
    assert (successor.scopes, successor.adapters, successor.label) == ((Scope.MANAGE,), ("x",), "l")
    clock.now += 99
    assert tenancy.caller(old.text).globs == tenancy.caller(new.text).globs
    clock.now += 1
    with pytest.raises(Unauthenticated, match="expired"):
        tenancy.caller(old.text)
    tenancy.caller(new.text)
    with pytest.raises(Conflict):
        tenancy.keys.rotate(record.id, overlap_s=100, actor="test")


def test_rotation_never_lengthens_the_old_key(tenancy: Tenancy, clock: Clock) -> None:
    record, old = tenancy.keys.create("default", [Scope.INFER], lifetime_s=10, actor="test")
    tenancy.keys.rotate(record.id, overlap_s=1000, actor="test")
    clock.now += 10
    with pytest.raises(Unauthenticated):
        tenancy.caller(old.text)


def test_the_database_keeps_the_hash_alone(tenancy: Tenancy, settings: Settings) -> None:
    record, made = tenancy.keys.create("default", [Scope.INFER], actor="test")
    database = Opened(settings.database.url, busy_timeout_s=5)
    with database.read() as tx:
        (row,) = tx.execute(select(api_keys))
        everything = [list(map(tuple, tx.execute(select(table)))) for table in metadata.sorted_tables]
    database.close()
    assert (row.id, row.hash) == (record.id, hash_of(made.text, read_secret(settings.auth.secret_file)))
    assert row.hash in str(everything)
    assert made.text.split("_")[2] not in str(everything)


@pytest.mark.parametrize("text", ["' OR 1=1 --", "dmx_%", "dmx_' OR '1'='1_x_y", "\x00", "é"])
def test_keys_are_looked_up_as_values(tenancy: Tenancy, text: str) -> None:
    tenancy.keys.create("default", [Scope.INFER], actor="test")
    with pytest.raises(Unauthenticated):
        tenancy.caller(text)


def test_every_mutation_of_tenants_and_keys_is_in_the_audit_log_without_a_key(tenancy: Tenancy) -> None:
    tenancy.tenants.create("acme", Limits(), actor="a")
    tenancy.tenants.set_limits("acme", Limits(tokens_per_min=9), actor="b")
    record, made = tenancy.keys.create("acme", [Scope.INFER], actor="c")
    successor, second = tenancy.keys.rotate(record.id, overlap_s=1, actor="d")
    tenancy.keys.revoke(successor.id, actor="e")
    tenancy.tenants.set_disabled("acme", True, actor="f")
    tenancy.tenants.set_disabled("acme", False, actor="g")
    for refused in (
        lambda: tenancy.tenants.create("acme", Limits(), actor="x"),
        lambda: tenancy.keys.create("absent", [Scope.INFER], actor="x"),
        lambda: tenancy.keys.revoke("0" * 16, actor="x"),
    ):
        with pytest.raises((Conflict, NotFound)):
            refused()
    found = tenancy.audit_lines(limit=100)[::-1]
    assert [(line.actor, line.action) for line in found] == [
        ("a", "tenant.create"),
        ("b", "tenant.limits"),
        ("c", "key.create"),
        ("d", "key.rotate"),
        ("e", "key.revoke"),
        ("f", "tenant.disable"),
        ("g", "tenant.enable"),
    ]
    assert not any(key.text.split("_")[2] in str(found) for key in (made, second))
    assert tenancy.verify_audit().problem is None


def test_a_server_is_open_to_others_only_with_a_key_or_by_name(settings: Settings) -> None:
    wide = settings.model_copy(update={"server": Server(host="0.0.0.0")})  # noqa: S104
    for server in (wide.server, Server(admin_host="0.0.0.0", admin_port=0)):  # noqa: S104
        with pytest.raises(InvalidRequest, match="bootstrap"):
            check_exposure(settings.model_copy(update={"server": server}))
    assert not check_exposure(settings)
    assert not check_exposure(settings.model_copy(update={"server": Server(admin_port=0)}))
    assert not check_exposure(wide.model_copy(update={"server": Server(host="0.0.0.0", insecure=True)}))  # noqa: S104
    with Tenancy(wide) as tenancy:
        tenancy.keys.create("default", [Scope.ADMIN], actor="test")
    assert check_exposure(wide)


def test_identical_tenants_and_grants_at_once_are_one_each(tenancy: Tenancy, settings: Settings) -> None:
    with Registry(settings.database.url) as registry:
        publish(registry, "d", "a" * 64)

    def create(_: int) -> int:
        try:
            tenancy.tenants.create("acme", Limits(), actor="test")
        except Conflict:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(16))) == 1
        list(pool.map(lambda _: tenancy.grants.grant("default", "d", "acme", actor="test"), range(16)))
        withdrawn = pool.map(lambda _: tenancy.grants.withdraw("default", "d", "acme", actor="t"), range(16))
        assert sum(withdrawn) == 1
    actions = [line.action for line in tenancy.audit_lines(limit=100)]
    assert actions == ["grant.withdraw", "grant.create", "tenant.create", "version.publish"]


# -- what a principal reaches ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "reached"),
    [
        ((), {"acme/a", "acme/ab", "other/a"}),
        (("a",), {"acme/a"}),
        (("a*",), {"acme/a", "acme/ab"}),
        (("*/a",), {"acme/a", "other/a"}),
        (("other/*", "ab"), {"acme/ab", "other/a"}),
        (("b",), set()),
    ],
)
def test_globs(globs: tuple[str, ...], reached: set[str]) -> None:
    principal = Principal(
        tenant="acme", key_id="", scopes=frozenset(), globs=tuple(check_globs(list(globs))), limits=Limits()
    )
    deltas = [("acme", "a"), ("acme", "ab"), ("other", "a")]
    assert {f"{owner}/{name}" for owner, name in deltas if principal.reaches(owner, name)} == reached


@pytest.mark.parametrize("glob", ["", "(a+)+", "a|b", "[a-z]", "A", "a/b/c", "../x", "a?", "a" * 200])
def test_globs_are_names_and_stars(glob: str) -> None:
    with pytest.raises(InvalidRequest):
        check_globs([glob])


def test_a_glob_of_stars_is_matched_in_no_time() -> None:
    principal = Principal(
        tenant="t", key_id="", scopes=frozenset(), globs=("*a" * 31 + "b",), limits=Limits()
    )
    assert not principal.reaches("t", "a" * 63)
