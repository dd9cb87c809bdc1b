"""A PostgreSQL server of one's own for tests: Debian's binaries, a private directory, one unix socket, no port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

ACCOUNTS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root; root's tests run it as the first of these that exists."""


def find_binaries() -> Path | None:
    """The directory that has `initdb` and `postgres`, of the newest version installed; None where there is none."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in installed), key=lambda path: int(path.parent.name), default=None)


@contextmanager
def running(binaries: Path) -> Iterator[PostgresServer]:
    """Start a server and end it with the block, and with this process whatever ends that."""
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a unix socket's path is short
    account = None
    if os.geteuid() == 0:
        account = next(name for name in ACCOUNTS if any(name == known.pw_name for known in pwd.getpwall()))
        shutil.chown(directory, account)
    as_account = {"user": account, "cwd": directory, "stdin": subprocess.DEVNULL}
    try:
        data = directory / "data"
        initdb = [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8"]
        # a collation that is not C, so that a test sees where ours is forgotten
        initdb += ["--locale-provider=icu", "--icu-locale=en", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, **as_account)
        log = (directory / "log").open("wb")
        # ended by the kernel where this process is; without fsync, since only its clients are killed here
        command = ["setpriv", "--pdeathsig", "QUIT", binaries / "postgres", "-D", data, "-k", directory]
        command += ["-c", "listen_addresses=", "-c", "fsync=off"]
        process = subprocess.Popen(command, stdout=log, stderr=log, **as_account)
        server = PostgresServer(directory)
        try:
            server.wait(process, Path(log.name))
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once; there is nothing to keep
            process.wait()
            log.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class PostgresServer:
    """A running server. Databases are made on demand and go with it."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def url(self, database: str) -> str:
        """The URL of a database on this server."""
        return f"postgresql://postgres@/{database}?host={self._socket}"

    def make_database(self, name: str = "", *, template: str = "template1") -> str:
        """A new database, empty or as `template` is; its URL."""
        name = name or f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def clear(self, database: str) -> str:
        """Leave only the rows that migrations put there, and end whoever holds one; the URL of the database."""
        tables = (
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            " AND tablename NOT IN ('alembic_version', 'tenants')"
        )
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s"
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(others, [database, connection.info.backend_pid])
            names = ", ".join(f'"{name}"' for (name,) in connection.execute(tables))
            connection.execute(f"TRUNCATE {names} RESTART IDENTITY")
            connection.execute("DELETE FROM tenants WHERE name <> 'default'")
            full = "INSERT INTO buckets (tenant, kind, level, at) VALUES ('default', %s, 1e18, 0)"
            for kind in ("requests", "tokens"):
                connection.execute(full, [kind])
            connection.execute("INSERT INTO audit_head (id, seq, hash) VALUES (1, 0, repeat('0', 64))")
        return self.url(database)

    def wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Until it answers; raises RuntimeError with its log where it has ended."""
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                if process.poll() is not None:
                    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from None
                time.sleep(0.02)
            else:
                return
