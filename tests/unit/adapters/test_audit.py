"""The audit log: in the mutation's transaction, chained, and broken by any change."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from adapters import audit
from adapters.errors import Conflict, NotFound
from adapters.migrations.database import Database
from adapters.registry import Registry
from tests.unit.adapters.test_registry import A, B, T, publish


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    with Registry(url, clock=lambda: 1234.5) as made:
        yield made


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url, busy_timeout_s=5)
    yield made
    made.close()


def tamper(database: Database, *statements: str) -> None:
    with database.write() as tx:
        for statement in statements:
            assert tx.execute(text(statement)).rowcount


def lines(database: Database) -> list[tuple[str, str, str, str]]:
    with database.read() as tx:
        found = audit.lines(tx, limit=1000)
    assert [line.seq for line in found] == list(range(len(found), 0, -1))
    return [(line.actor, line.action, line.subject, line.details) for line in reversed(found)]


def verdict(database: Database, **options: Any) -> audit.Verdict:
    with database.read() as tx:
        return audit.verify(tx, **options)


def test_every_mutation_of_the_registry_writes_one_line(registry: Registry, database: Database) -> None:
    publish(registry, "d", A)
    publish(registry, "d", B, alias="prod")
    publish(registry, "d", A)  # changes nothing
    publish(registry, "d", A, alias="old")
    publish(registry, "d", "c" * 64, status="validating")
    registry.finish_validation(T, "d", 3, "ready", proof={}, actor="key:1")
    registry.set_alias(T, "d", "prod", 3, expected_revision=1, actor="key:2")
    registry.delete_version(T, "d", 2, actor="key:3")
    registry.delete_adapter(T, "d", actor="key:4")
    assert [line[:3] for line in lines(database)] == [
        ("system", "version.publish", "d@v1"),
        ("system", "version.publish", "d@v2"),
        ("system", "alias.set", "d:old"),
        ("system", "version.publish", "d@v3"),
        ("key:1", "version.validate", "d@v3"),
        ("key:2", "alias.set", "d:prod"),
        ("key:3", "version.delete", "d@v2"),
        ("key:4", "adapter.delete", "d"),
    ]
    assert A in lines(database)[0][3]
    assert verdict(database) == audit.Verdict(8, verdict(database).head, None)


def test_what_fails_writes_no_line(registry: Registry, database: Database) -> None:
    publish(registry, "d", A)
    for refused in (
        lambda: registry.set_alias(T, "d", "prod", 1, expected_revision=7),
        lambda: registry.delete_version(T, "d", 9),
        lambda: registry.delete_adapter(T, "absent"),
    ):
        with pytest.raises((Conflict, NotFound)):
            refused()
    assert len(lines(database)) == 1


def test_no_line_without_its_mutation_and_no_mutation_without_its_line(
    registry: Registry, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(audit, "_hash", fail)
        with pytest.raises(OSError, match="no room"):
            publish(registry, "d", A)
    with pytest.raises(NotFound):
        registry.get_adapter(T, "d")
    assert verdict(database) == audit.Verdict(0, audit.GENESIS, None)


def test_writers_at_once_make_one_chain(registry: Registry, database: Database) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: publish(registry, f"d{n}", f"{n:064x}"), range(24)))
    assert verdict(database).problem is None
    assert verdict(database).num_lines == 24


TAMPERINGS: dict[str, str] = {
    "changed actor": "UPDATE audit_log SET actor = 'nobody' WHERE seq = 3",
    "changed time": "UPDATE audit_log SET at = at + 1 WHERE seq = 1",
    "changed details": "UPDATE audit_log SET details = replace(details, '\"', ' ') WHERE seq = 5",
    "removed first": "DELETE FROM audit_log WHERE seq = 1",
    "removed middle": "DELETE FROM audit_log WHERE seq = 3",
    "removed last": "DELETE FROM audit_log WHERE seq = 5",
    "removed all": "DELETE FROM audit_log",
    "removed head": "DELETE FROM audit_head",
    "renumbered": "UPDATE audit_log SET seq = 6 WHERE seq = 5",
    "put in": "INSERT INTO audit_log SELECT 6, at, actor, action, tenant, subject, details, 'x' FROM audit_log LIMIT 1",
    "reordered": "UPDATE audit_log SET seq = 9 WHERE seq = 2; UPDATE audit_log SET seq = 2 WHERE seq = 3; "
    "UPDATE audit_log SET seq = 3 WHERE seq = 9",
    "exchanged": "UPDATE audit_log SET subject = (SELECT subject FROM audit_log WHERE seq = 1) WHERE seq = 2",
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_verify_notices(registry: Registry, database: Database, tampering: str) -> None:
    for number in range(5):
        publish(registry, f"d{number}", A)
    assert verdict(database).problem is None
    tamper(database, *TAMPERINGS[tampering].split("; "))
    assert verdict(database).problem is not None


def test_a_tail_that_was_removed_with_its_head_lacks_the_head_that_was_noted(
    registry: Registry, database: Database
) -> None:
    for number in range(3):
        publish(registry, f"d{number}", A)
    noted = verdict(database).head
    tamper(
        database,
        "DELETE FROM audit_log WHERE seq = 3",
        "UPDATE audit_head SET seq = 2, hash = (SELECT hash FROM audit_log WHERE seq = 2)",
    )
    assert verdict(database).problem is None  # the database alone can't know
    assert verdict(database, expected=noted).problem == "no line has the hash that was expected"


def test_a_chain_that_was_rewritten_whole_lacks_the_head_that_was_noted(
    registry: Registry, database: Database
) -> None:
    publish(registry, "d", A)
    noted = verdict(database).head
    publish(registry, "e", B)
    assert verdict(database, expected=noted).problem is None
    tamper(database, "DELETE FROM audit_log", f"UPDATE audit_head SET seq = 0, hash = '{audit.GENESIS}'")  # noqa: S608
    publish(registry, "f", B)
    assert verdict(database).problem is None
    assert verdict(database, expected=noted).problem == "no line has the hash that was expected"
