"""An open registry database, SQLite or PostgreSQL: transactions whose every failure is RegistryUnavailable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
from alembic.util import CommandError
from sqlalchemy import URL, Connection, exc, make_url

from adapters import migrations
from adapters.errors import RegistryUnavailable
from adapters.migrations import postgresql, sqlite

_OWN_BUGS = (exc.IntegrityError, exc.ProgrammingError, exc.DataError, exc.NotSupportedError)
_OPEN = {"sqlite": sqlite.open_sqlite, "postgresql": postgresql.open_postgresql}
_LACKS_PRIVILEGE = "42501"


class Database:
    """A pool of connections to one database, brought to this release's tables when it is opened. Thread-safe."""

    def __init__(self, url: str, *, busy_timeout_s: float) -> None:
        """`url`: `sqlite:///path` or `postgresql://user:password@host/database`. Raises RegistryUnavailable."""
        parsed = _parse(url)
        self._reader, self._writer = _OPEN[parsed.get_backend_name()](
            parsed,
            busy_timeout_s,
            pool_timeout=busy_timeout_s,
            json_serializer=partial(json.dumps, allow_nan=False, separators=(",", ":")),
        )
        try:
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
        with _database_errors(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The only writing transaction at this time; durable when the block is left, undone where it raises.

        Raises RegistryUnavailable, after which nothing was written; unless the connection to PostgreSQL broke
        during the commit, of which nobody can know the outcome. A write that comes later sees it.
        """
        with _database_errors(), self._writer.begin() as connection:
            yield connection

    def close(self) -> None:
        """Close the pooled connections; the last one empties SQLite's write-ahead log."""
        self._reader.dispose()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        parsed = None
    got = parsed.get_backend_name() if parsed is not None else "no URL"  # no more of it: URLs hold passwords
    if parsed is None or got not in _OPEN or (got == "sqlite" and parsed.database in (None, "", ":memory:")):
        raise RegistryUnavailable(
            f"The registry's database must be an SQLite file or a PostgreSQL database; got {got}.",
            param="database",
            remedy="Give it as sqlite:///relative/path.db, sqlite:////absolute/path.db or "
            "postgresql://user:password@host/database.",
        )
    return parsed


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except exc.TimeoutError as error:
        raise _unavailable("all its connections are in use") from error
    except exc.DBAPIError as error:
        if isinstance(error, _OWN_BUGS) and getattr(error.orig, "sqlstate", None) != _LACKS_PRIVILEGE:
            raise
        raise _unavailable(_reason(error.orig)) from error


def _reason(error: BaseException | None) -> str:
    """What to tell of a driver's error: our words, since the driver's can name hosts, users and paths."""
    if isinstance(error, psycopg.Error):
        code, reasons = error.sqlstate or postgresql.NOT_REACHED, postgresql.REASONS
    else:  # also where SQLite's driver has no code to give
        code, reasons = str(getattr(error, "sqlite_errorname", type(error).__name__)), sqlite.REASONS
    return next((reasons[key] for key in reasons if code.startswith(key)), code)


def _unavailable(reason: str) -> RegistryUnavailable:
    return RegistryUnavailable(
        f"The registry's database failed: {reason}. Nothing was changed.",
        remedy="Try again; if it stays, check the database and the disk that holds it.",
    )
