"""PostgreSQL behind the registry, through psycopg: the same promises as SQLite gives, for many machines."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event

REASONS = {  # SQLSTATE, or its class -> what to say; the first that the code begins with
    "55P03": "another writer kept it locked",
    "40": "another transaction was in the way",
    "53100": "its disk is full",
    "53300": "it has no connection left",
    "53": "it has too few resources",
    "57P": "it is starting or shutting down",
    "25006": "it is read-only",
    "42501": "its user lacks a privilege",
    "08": "its connection broke",
    "XX": "it is damaged",
    "58": "reading or writing its files failed",
}
NOT_REACHED = "it can't be reached, or refuses the login"
"""What to say where there is no SQLSTATE: no server has answered."""

_WRITER_LOCK = int.from_bytes(b"deltamux", "big")


def open_postgresql(url: URL, busy_timeout_s: float, **options: Any) -> tuple[Engine, Engine]:
    """(for reading, for writing) over one pool of connections to the database of `url`.

    A reading transaction sees one snapshot. A writing one is the only one from its beginning, by an advisory lock
    that the server frees with the transaction; it waits `busy_timeout_s` for its turn.
    """
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,  # a restarted server costs no request
        connect_args={
            "connect_timeout": max(2, math.ceil(busy_timeout_s)),
            # a server that is gone without a word is given up after about 20 s
            "keepalives_idle": 10,
            "keepalives_interval": 3,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
        **options,
    )
    lock = (
        f"SET LOCAL lock_timeout = {max(1, round(busy_timeout_s * 1000))};"
        # `off` would acknowledge what a crash of the server still loses; stronger settings stay as they are
        "SELECT set_config('synchronous_commit', 'on', true)"
        " WHERE current_setting('synchronous_commit') = 'off';"
        f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})"
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes"):
            connection.exec_driver_sql(lock)

    return (
        engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
        # each statement behind the lock sees what earlier writers have committed
        engine.execution_options(isolation_level="READ COMMITTED", writes=True),
    )
