"""The audit log: one line per mutation, written in the mutation's own transaction, each chained to the one before.

    hash(n) = sha256(JSON of [hash(n - 1), n, at, actor, action, tenant, subject, details]),  hash(0) = 64 zeros

A line that was changed, removed or put in breaks the chain at that place; one removed from the end differs from the
head, which is kept apart. Whoever can rewrite the whole database can rewrite the whole chain: the head's hash, noted
elsewhere (`deltamux audit verify` prints it), is what reveals that. Lines hold names, digests and numbers only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from adapters.migrations.access import audit_head, audit_log

SYSTEM = "system"
"""The actor of what no caller asked for."""

GENESIS = "0" * 64
_HEAD = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened. `at`: Unix seconds. `actor`: who, as `key:<id>`, `open` (no keys), `cli` or SYSTEM."""

    at: float
    actor: str
    action: str
    tenant: str
    subject: str
    details: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the log; `details` is the JSON that was hashed."""

    seq: int
    at: float
    actor: str
    action: str
    tenant: str
    subject: str
    details: str
    hash: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying found: how many lines, the head's hash, and the first thing wrong, None where nothing is."""

    num_lines: int
    head: str
    problem: str | None


def append(tx: Connection, entry: Entry) -> None:
    """Write `entry` as the next line. `tx` writes what the entry says; both or neither become durable."""
    # the head's row also keeps other writers out until this transaction ends
    counted = (
        update(audit_head)
        .where(audit_head.c.id == _HEAD)
        .values(seq=audit_head.c.seq + 1)
        .returning(audit_head.c.seq, audit_head.c.hash)
    )
    head = tx.execute(counted).one()
    details = json.dumps(dict(entry.details), sort_keys=True, allow_nan=False, separators=(",", ":"))
    values = (head.seq, entry.at, entry.actor, entry.action, entry.tenant, entry.subject, details)
    line = Line(*values, hash=_hash(head.hash, values))
    tx.execute(insert(audit_log).values(asdict(line)))
    tx.execute(update(audit_head).where(audit_head.c.id == _HEAD).values(hash=line.hash))


def lines(tx: Connection, *, limit: int) -> list[Line]:
    """Up to `limit` lines, newest first."""
    query = select(audit_log).order_by(audit_log.c.seq.desc()).limit(limit)
    return [_line(row) for row in tx.execute(query)]


def verify(tx: Connection, *, expected: str | None = None) -> Verdict:
    """Recompute the whole chain. Reads the log once, in order, without holding it in memory.

    `expected`: a hash that some line must have, such as the head at an earlier time.
    """
    head = tx.execute(select(audit_head).where(audit_head.c.id == _HEAD)).one_or_none()
    if head is None:
        return Verdict(0, GENESIS, "the head is missing")
    previous, num_lines = GENESIS, 0
    problem, seen = None, expected in (None, GENESIS)
    ordered = select(audit_log).order_by(audit_log.c.seq).execution_options(yield_per=1000)
    for row in tx.execute(ordered):
        line = _line(row)
        num_lines += 1
        seen = seen or line.hash == expected
        if problem is not None:
            continue
        if line.seq != num_lines:
            problem = f"line {num_lines} is missing"
        elif line.hash != _hash(previous, _values(line)):
            problem = f"line {line.seq} is not what was written, or the line before it is not"
        previous = line.hash
    if problem is None and (num_lines, previous) != (head.seq, head.hash):
        problem = f"the log ends at line {num_lines}, but {head.seq} were written"
    if problem is None and not seen:
        problem = "no line has the hash that was expected"
    return Verdict(num_lines, head.hash, problem)


def _line(row: Row[Any]) -> Line:
    return Line(row.seq, row.at, row.actor, row.action, row.tenant, row.subject, row.details, row.hash)


def _values(line: Line) -> tuple[int, float, str, str, str, str, str]:
    return line.seq, line.at, line.actor, line.action, line.tenant, line.subject, line.details


def _hash(previous: str, values: tuple[int, float, str, str, str, str, str]) -> str:
    # repr of a float, which JSON uses, is the one text that reads back as the same number
    text = json.dumps([previous, *values], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
