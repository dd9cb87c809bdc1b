"""What is PostgreSQL's own: its locks, its settings, its failures. The registry's suite runs on it as on SQLite."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import make_url

from adapters.errors import RegistryUnavailable
from adapters.migrations.database import Database
from adapters.registry import Registry
from tests.postgres import PostgresServer


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.clear("shared")


@pytest.fixture
def own_url(postgres: PostgresServer) -> str:
    """A database that the test may spoil."""
    return postgres.make_database(template="migrated")


def publish(registry: Registry, name: str, number: int) -> int:
    record = registry.publish(
        "default", name, f"{number:064x}", method="LORA", backbone_digest="", task="causal-lm", size_bytes=1,
        labels={}, proof={},
    )  # fmt: skip
    return record.version


def refused(attempt: Callable[[], object], reason: str) -> None:
    with pytest.raises(RegistryUnavailable, match=reason) as caught:
        attempt()
    assert caught.value.remedy
    assert not [word for word in ("canary", "postgres@", "/pg-") if word in str(caught.value)]


def test_names_are_listed_by_their_bytes(url: str) -> None:
    names = ["a-b", "a.b", "a_b", "ab", "b", "a0", "a-c"]
    with Registry(url) as registry:
        for name in names:
            publish(registry, name, 1)
        pages, after = [], None
        while True:
            page = registry.list_adapters("default", limit=2, after=after)
            pages += [item.name for item in page.items]
            if (after := page.next_after) is None:
                break
    assert pages == sorted(names)


def test_writers_wait_for_their_turn_and_no_longer_than_they_may(url: str) -> None:
    with Registry(url, busy_timeout_s=0.1) as impatient, Registry(url) as patient:
        publish(impatient, "sql", 1)
        holder = Database(url, busy_timeout_s=1)
        with ThreadPoolExecutor(1) as pool, holder.write():
            waiting = pool.submit(publish, patient, "sql", 2)
            refused(lambda: publish(impatient, "sql", 3), "another writer kept it locked")
            assert [item.version for item in impatient.list_versions("default", "sql")] == [1]
            assert not waiting.done()
        assert waiting.result(timeout=10) == 2
        assert publish(impatient, "sql", 3) == 3
        holder.close()


def test_writers_of_two_databases_do_not_wait_for_each_other(postgres: PostgresServer, url: str) -> None:
    holder = Database(postgres.make_database(template="migrated"), busy_timeout_s=1)
    with Registry(url, busy_timeout_s=0.1) as registry, holder.write():
        assert publish(registry, "sql", 1) == 1
    holder.close()


def test_a_commit_is_durable_although_the_server_would_not_insist(own_url: str) -> None:
    name = make_url(own_url).database
    for setting, effective in (("off", "on"), ("remote_write", "remote_write")):
        with psycopg.connect(own_url, autocommit=True) as admin:
            admin.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = {setting}')
        database = Database(own_url, busy_timeout_s=1)
        with database.write() as tx:
            assert tx.exec_driver_sql("SHOW synchronous_commit").scalar() == effective
        database.close()


def test_a_restarted_server_costs_no_call(url: str) -> None:
    with Registry(url) as registry:
        publish(registry, "sql", 1)
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                          " AND datname = current_database()")  # fmt: skip
        assert publish(registry, "sql", 2) == 2


def test_a_connection_that_breaks_inside_a_write(url: str) -> None:
    database = Database(url, busy_timeout_s=1)

    def broken() -> None:
        with database.write() as tx:
            tx.exec_driver_sql("CREATE TABLE half_done (id int)")
            pid = tx.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
            with psycopg.connect(url, autocommit=True) as admin:
                admin.execute(f"SELECT pg_terminate_backend({pid})")
            tx.exec_driver_sql("SELECT 1")

    refused(broken, "it is starting or shutting down")
    with database.read() as tx:
        assert tx.exec_driver_sql("SELECT to_regclass('half_done')").scalar() is None
    database.close()


def test_no_server(url: str) -> None:
    refused(lambda: Registry(url.replace("/pg-", "/canary-pg-")), "can't be reached, or refuses the login")
    refused(
        lambda: Registry("postgresql://u:canary@127.0.0.1:1/db", busy_timeout_s=0.1),
        "can't be reached, or refuses the login",
    )


def test_no_such_database(postgres: PostgresServer) -> None:
    refused(lambda: Registry(postgres.url("canary")), "can't be reached, or refuses the login")


def test_a_user_without_the_privilege(postgres: PostgresServer, own_url: str) -> None:
    with psycopg.connect(own_url, autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS reader")
        admin.execute("CREATE ROLE reader LOGIN")
        admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    with Registry(own_url.replace("postgres@", "reader@")) as registry:
        refused(lambda: publish(registry, "sql", 1), "its user lacks a privilege")
    empty = postgres.make_database()
    refused(lambda: Registry(empty.replace("postgres@", "reader@")), "its user lacks a privilege")


def test_of_a_newer_release(own_url: str) -> None:
    with psycopg.connect(own_url) as admin:
        admin.execute("UPDATE alembic_version SET version_num = '9999'")
    refused(lambda: Registry(own_url), "newer release")


def test_every_connection_in_use(url: str) -> None:
    database = Database(url, busy_timeout_s=0.05)
    held = [database.read() for _ in range(15)]
    for transaction in held:
        transaction.__enter__()
    refused(lambda: database.read().__enter__(), "all its connections are in use")
    for transaction in held:
        transaction.__exit__(None, None, None)
    database.close()


def test_the_writers_lock_is_free_after_a_failed_write(url: str) -> None:
    with Registry(url, busy_timeout_s=0.2) as registry:
        with pytest.raises(Exception, match="alias"):
            registry.set_alias("default", "sql", "no alias", 1, expected_revision=None)
        done = threading.Event()
        worker = threading.Thread(target=lambda: (publish(registry, "sql", 1), done.set()))
        worker.start()
        worker.join(5)
        assert done.is_set()
