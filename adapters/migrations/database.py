"""An open registry database: transactions whose every failure is RegistryUnavailable.

SQLite in WAL mode with `synchronous=FULL`: a commit that was acknowledged survives a power cut.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, event, exc, make_url

from adapters import migrations
from adapters.errors import RegistryUnavailable

_OWN_BUGS = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)
_REASONS = {  # primary SQLite result code -> what to say
    "SQLITE_BUSY": "another writer kept it locked",
    "SQLITE_FULL": "its disk is full",
    "SQLITE_IOERR": "reading or writing its file failed",
    "SQLITE_CANTOPEN": "its file can't be opened",
    "SQLITE_READONLY": "its file is read-only",
    "SQLITE_CORRUPT": "its file is damaged",
    "SQLITE_NOTADB": "its file is not a database",
}
_WAL_RETRY_S = 0.01


class Database:
    """A pool of connections to one database, brought to this release's tables when it is opened. Thread-safe."""

    def __init__(self, url: str, *, busy_timeout_s: float) -> None:
        parsed = _sqlite_url(url)
        self._engine = create_engine(
            parsed,
            connect_args={"timeout": busy_timeout_s},
            pool_timeout=busy_timeout_s,
            json_serializer=partial(json.dumps, allow_nan=False, separators=(",", ":")),
        )

        @event.listens_for(self._engine, "connect")
        def prepare(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # the driver's own BEGIN would come too late and be deferred
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            _enter_wal(connection, deadline_s=time.monotonic() + busy_timeout_s)

        @event.listens_for(self._engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

        # A transaction that reads first and upgrades to writing can fail at once, whatever the timeout; one that
        # starts as the writer waits for its turn.
        self._writer = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        try:
            with suppress(OSError):  # SQLite says it better when it can't open the file
                Path(str(parsed.database)).absolute().parent.mkdir(parents=True, exist_ok=True)
            with self.read() as connection:
                current = migrations.is_current(connection)
            if not current:
                with self.write() as connection:
                    migrations.upgrade(connection)
        except CommandError as error:
            self.close()
            raise RegistryUnavailable(
                "The registry's database was made by a newer release of deltamux.",
                param="database",
                remedy="Install that release, or give another database.",
            ) from error
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout. Raises RegistryUnavailable."""
        with _database_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The only writing transaction at this time; durable when the block is left, undone where it raises.

        Raises RegistryUnavailable, after which nothing was written.
        """
        with _database_errors(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close the pooled connections; the last one empties the write-ahead log."""
        self._engine.dispose()


def _sqlite_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        got = parsed.get_backend_name() if parsed is not None else "no URL"
        raise RegistryUnavailable(
            f"The registry's database must be an SQLite file; got {got}.",  # no more of it: URLs hold passwords
            param="database",
            remedy="Give it as sqlite:///relative/path.db or sqlite:////absolute/path.db.",
        )
    return parsed


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


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except _OWN_BUGS:
        raise
    except exc.TimeoutError as error:
        raise _unavailable("all its connections are in use") from error
    except exc.DBAPIError as error:
        code = str(getattr(error.orig, "sqlite_errorname", type(error.orig).__name__))
        raise _unavailable(next((_REASONS[key] for key in _REASONS if code.startswith(key)), code)) from error


def _unavailable(reason: str) -> RegistryUnavailable:
    return RegistryUnavailable(
        f"The registry's database failed: {reason}. Nothing was changed.",
        remedy="Try again; if it stays, check the disk that holds the database.",
    )
