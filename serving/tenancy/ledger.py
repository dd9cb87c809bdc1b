"""The ledger: one row per admitted request, whatever becomes of it.

A row is written open before the request's first output leaves, and closed with the tokens when it has ended. So
nothing is answered that the ledger does not know, and what a killed process leaves open is found by the next one.
One thread writes for all requests: those that open together share a commit, and closing waits a moment for company.
Rows are kept for as long as the operator says (`ledger.keep_days`), then removed by `purge`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from adapters import audit
from adapters.errors import DeltamuxError
from adapters.migrations.access import usage
from adapters.migrations.database import Database

log = logging.getLogger(__name__)

HOUR_S = 3600
LINGER_S = 0.05
"""How long a closed request waits for others to share its commit."""
RETRY_S = 0.5
PURGED_AT_ONCE = 10_000
"""Rows that one transaction removes; others wait for it meanwhile."""
BASE = "base"
"""The bare backbone where a report names adapters by digest."""


class Outcome(StrEnum):
    """What became of a request. CRASHED: its gateway ended before it did."""

    OPEN = "open"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of one request; `cached` are those of `prompt` that were not computed again."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True, slots=True)
class _Open:
    row: Mapping[str, Any]
    written: Future[None]


@dataclass(frozen=True, slots=True)
class _Close:
    request_id: str
    outcome: Outcome
    tokens: Tokens
    at: float


Closed = Callable[[Outcome, Tokens], object]


class Ledger:
    """Writes rows of one database. Thread-safe; `recover`, `purge` and `stop` block. `clock`: Unix seconds.

    `on_closed` is told of each row that this ledger has closed or marked as crashed, once that is durable, on the
    ledger's own thread or that of `recover`.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float], on_closed: Closed) -> None:
        self._database = database
        self._clock = clock
        self._on_closed = on_closed
        self._queue: queue.SimpleQueue[_Open | _Close | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def open(
        self, request_id: str, tenant: str, key_id: str, *, adapter_digest: str | None, reserved_tokens: int
    ) -> Future[None]:
        """Begin a row. The future ends when it is durable, or holds the RegistryUnavailable that kept it from it."""
        now = self._clock()
        row = {
            "id": request_id,
            "tenant": tenant,
            "key_id": key_id,
            "adapter_digest": adapter_digest,
            "hour": int(now // HOUR_S),
            "opened_at": now,
            "outcome": Outcome.OPEN,
            "reserved_tokens": reserved_tokens,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "completion_tokens": 0,
        }
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # whoever waits for it may be cancelled; the row is written all the same
        self._put(_Open(row, written))
        return written

    def close(self, request_id: str, outcome: Outcome, tokens: Tokens) -> None:
        """End a row that was begun. Kept and tried again for as long as the database fails."""
        self._put(_Close(request_id, outcome, tokens, self._clock()))

    def recover(self, *, older_than_s: float) -> int:
        """Mark as crashed what was begun longer ago and is still open; returns how many rows.

        One whose gateway is alive after all closes it later nonetheless. Raises RegistryUnavailable.
        """
        now = self._clock()
        left = (usage.c.outcome == Outcome.OPEN) & (usage.c.opened_at <= now - older_than_s)
        with self._database.write() as tx:
            done = tx.execute(update(usage).where(left).values(outcome=Outcome.CRASHED, closed_at=now))
        for _ in range(done.rowcount):
            self._on_closed(Outcome.CRASHED, Tokens())
        return done.rowcount

    def purge(self, *, older_than_s: float) -> int:
        """Remove ended rows of whole hours that are older than this; returns how many. Raises RegistryUnavailable.

        In several transactions, between which others write, each with its line of the audit log.
        """
        before = int((self._clock() - older_than_s) // HOUR_S)
        old = select(usage.c.id).where(usage.c.hour < before, usage.c.outcome != Outcome.OPEN)
        removed = 0
        while True:
            with self._database.write() as tx:
                some = delete(usage).where(usage.c.id.in_(old.limit(PURGED_AT_ONCE)))
                if not (rows := tx.execute(some).rowcount):
                    return removed
                details = {"before": before * HOUR_S, "rows": rows}
                audit.append(tx, audit.Entry(self._clock(), audit.SYSTEM, "usage.purge", "", "", details))
            removed += rows

    def stop(self) -> None:
        """Write what is left, and end the thread."""
        with self._starting:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _put(self, item: _Open | _Close) -> None:
        self._queue.put(item)
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="ledger", daemon=True)
                self._thread.start()

    def _write_all(self) -> None:
        kept: list[_Close] = []
        stopping = False
        while not stopping:
            batch, stopping = self._next(wait_s=RETRY_S if kept else None)
            kept = self._write([*kept, *batch])
        if kept:
            log.error("the ledger ends with %d rows that could not be closed", len(kept))

    def _next(self, *, wait_s: float | None) -> tuple[list[_Open | _Close], bool]:
        """(what is to be written together, whether that is the last)."""
        batch: list[_Open | _Close] = []
        deadline = None if wait_s is None else time.monotonic() + wait_s
        while True:
            try:
                timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
                item = self._queue.get(timeout=timeout)
            except queue.Empty:
                return batch, False
            if item is None:
                return batch, True
            batch.append(item)
            # somebody waits for an open row: take what is there already, and no longer
            now = time.monotonic()
            latest = now if isinstance(item, _Open) else now + LINGER_S
            deadline = latest if deadline is None else min(deadline, latest)

    def _write(self, batch: Sequence[_Open | _Close]) -> list[_Close]:
        """Commit `batch`; returns what has to be tried again."""
        opens = [item for item in batch if isinstance(item, _Open)]
        closes = [item for item in batch if isinstance(item, _Close)]
        if not batch:
            return []
        try:
            with self._database.write() as tx:
                if opens:
                    tx.execute(insert(usage), [item.row for item in opens])
                closed = [item for item in closes if _close(tx, item)]
        except DeltamuxError as error:
            log.warning("the ledger could not be written: %s", type(error).__name__)
            for item in opens:
                item.written.set_exception(error)
            return closes
        for item in opens:
            item.written.set_result(None)
        for done in closed:
            self._on_closed(done.outcome, done.tokens)
        return []


def _close(tx: Connection, item: _Close) -> bool:
    """Whether there was such a row: a request that was never opened has none."""
    values = {
        "outcome": item.outcome,
        "closed_at": item.at,
        **{f"{kind}_tokens": number for kind, number in asdict(item.tokens).items()},
    }
    return bool(tx.execute(update(usage).where(usage.c.id == item.request_id).values(values)).rowcount)


class Group(StrEnum):
    """What a report's rows are about."""

    TENANT = "tenant"
    KEY = "key"
    ADAPTER = "adapter"
    HOUR = "hour"
    OUTCOME = "outcome"


_COLUMNS: Mapping[Group, ColumnElement[Any]] = {
    Group.TENANT: usage.c.tenant,
    Group.KEY: usage.c.key_id,
    Group.ADAPTER: usage.c.adapter_digest,
    Group.HOUR: usage.c.hour,
    Group.OUTCOME: usage.c.outcome,
}
_COUNTED = ("prompt_tokens", "cached_tokens", "completion_tokens")


def report(
    tx: Connection,
    by: Sequence[Group],
    *,
    where: Mapping[Group, str],
    start: float,
    end: float,
    limit: int,
) -> list[dict[str, Any]]:
    """Sums over the requests that were opened from `start` to before `end` (Unix seconds), in groups, in their order.

    One row per group: a value for each of `by` (hours as the Unix second that they begin with), `requests` and the
    tokens. `where`: only these.
    """
    groups = [_COLUMNS[group].label(group.value) for group in by]
    sums = [func.sum(usage.c[name]).label(name) for name in _COUNTED]
    query = select(*groups, func.count().label("requests"), *sums).where(
        usage.c.opened_at >= start, usage.c.opened_at < end,
        usage.c.hour >= int(start // HOUR_S), usage.c.hour <= int(end // HOUR_S),
        *(_COLUMNS[group] == (None if value == BASE else value) for group, value in where.items()),
    )  # fmt: skip
    if by:
        ordered = [_COLUMNS[group] for group in by]
        query = query.group_by(*ordered).order_by(*ordered)
    rows = [dict(row) for row in tx.execute(query.limit(limit)).mappings()]
    for row in rows:
        if Group.ADAPTER in row:
            row[Group.ADAPTER.value] = row[Group.ADAPTER.value] or BASE
        row.update({name: row[name] or 0 for name in _COUNTED})
        if Group.HOUR in row:
            row[Group.HOUR.value] *= HOUR_S
    return rows
