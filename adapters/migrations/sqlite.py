"""SQLite behind the registry: WAL with `synchronous=FULL`, so an acknowledged commit survives a power cut."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event

from adapters.errors import RegistryUnavailable

REASONS = {  # primary result code -> what to say
    "SQLITE_BUSY": "another writer kept it locked",
    "SQLITE_FULL": "its disk is full",
    "SQLITE_IOERR": "reading or writing its file failed",
    "SQLITE_CANTOPEN": "its file can't be opened",
    "SQLITE_READONLY": "its file is read-only",
    "SQLITE_CORRUPT": "its file is damaged",
    "SQLITE_NOTADB": "its file is not a database",
}
_WAL_RETRY_S = 0.01


def open_sqlite(url: URL, busy_timeout_s: float, **options: Any) -> tuple[Engine, Engine]:
    """(for reading, for writing) over one pool of connections to the file of `url`, which may not exist yet.

    A writing transaction is the only one from its beginning; it waits `busy_timeout_s` for its turn.
    """
    with suppress(OSError):  # SQLite says it better when it can't open the file
        Path(str(url.database)).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": busy_timeout_s}, **options)

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN would come too late and be deferred
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        _enter_wal(connection, deadline_s=time.monotonic() + busy_timeout_s)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    # A transaction that reads first and upgrades to writing can fail at once, whatever the timeout; one that
    # starts as the writer waits for its turn.
    return engine, engine.execution_options(begin="BEGIN IMMEDIATE")


def _enter_wal(connection: sqlite3.Connection, deadline_s: float) -> None:
    """Switch to WAL, which the file remembers. SQLite does not wait for the switch of another process: we do."""
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() >= deadline_s:
                raise
            time.sleep(_WAL_RETRY_S)
            continue
        if mode != "wal":
            raise RegistryUnavailable(
                f"The registry's database can't use a write-ahead log; its journal mode stays {mode!r}.",
                param="database",
                remedy="Put it on a local disk.",
            )
        return
