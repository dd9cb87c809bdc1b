"""Aliases: where they point, how they divide requests while a canary runs, and the way back.

An alias has a main version. While a canary runs, other versions have a share of its requests in percent, and the main
one has the rest. Which of them answers a request follows from the request's `unit` alone (a user, or where none is
named the request itself):

    place = first 8 bytes of sha256(JSON of [tenant, name, alias, unit]), as an integer, modulo 100

The shares lie side by side from 0 on, the lowest version first; places above them are the main version's. So a unit
stays where it is until shares change, and a single canary whose share grows keeps every unit that it had.

Every move is kept (`alias_history`) and names the move that a rollback returns to: moves of the main version stack up,
canaries and rollbacks do not, so that repeated rollbacks go further back and never to and fro.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from adapters.errors import Conflict, InvalidRequest, NotFound
from adapters.migrations.queries import VERSIONS, find_alias, require_version
from adapters.migrations.schema import AliasMove, AliasRecord, VersionRecord, adapters, alias_history, aliases
from adapters.migrations.schema import versions as version_rows
from adapters.names import LATEST

PERCENT = 100
MAX_CANARIES = 8
"""Versions that may share one alias, beside the main one."""


def place_of(tenant: str, name: str, alias: str, unit: str) -> int:
    """Where `unit` stands among the 100 places of an alias."""
    text = json.dumps([tenant, name, alias, unit], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % PERCENT


def version_at(place: int, version: int, canaries: Mapping[int, int]) -> int:
    """The version that answers for `place`: a canary's, or the main `version`."""
    for canary, percent in sorted(canaries.items()):
        if place < percent:
            return canary
        place -= percent
    return version


def check_canaries(version: int, canaries: Mapping[int, int]) -> None:
    """Raises InvalidRequest for shares that are no percentages, leave nothing to `version`, or are its own."""
    faults = {
        f"got {len(canaries)} versions, expected at most {MAX_CANARIES}": len(canaries) > MAX_CANARIES,
        f"version {version} is the main one and gets what the others leave": version in canaries,
        "expected shares of 1 to 99 percent": any(not 1 <= share < PERCENT for share in canaries.values()),
        "the shares leave nothing to the main version": sum(canaries.values()) >= PERCENT,
    }
    for fault, present in faults.items():
        if present:
            raise InvalidRequest(f"canaries: {fault}.", param="canaries")


def resolve_alias(tx: Connection, row: Row[Any], alias: str, unit: str | None) -> VersionRecord:
    """The version that answers `unit`; `row` is the main one's, as VERSIONS gives it, then the alias's `canaries`.

    Without a unit, and where there are no canaries, that is the main version.
    """
    main = VersionRecord(*list(row)[1:-1])
    shares = _shares(row.canaries)
    if unit is None or not shares:
        return main
    chosen = version_at(place_of(main.tenant, main.name, alias, unit), main.version, shares)
    if chosen == main.version:
        return main
    found = VERSIONS.where(adapters.c.id == row.id, version_rows.c.version == chosen)
    canary = tx.execute(found).one()  # which can't be deleted
    return VersionRecord(*list(canary)[1:])


def point(
    tx: Connection,
    adapter_id: int,
    alias: str,
    version: int | None,
    now: float,
    *,
    canaries: Mapping[int, int] | None = None,
    back_to: int | None = None,
    rolls_back: bool = False,
) -> tuple[int, float]:
    """Move, make or (`version` None) remove an alias; returns its revision and the time of the move.

    `back_to`, for a rollback: the revision that the next rollback returns to.
    """
    row = and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    before = tx.execute(select(aliases).where(row)).one_or_none()
    revision = (before.revision if before else 0) + 1
    if not rolls_back and before is not None and before.version is not None:
        back_to = before.revision  # one with the same main version is passed over by the rollback
    shares = {str(canary): percent for canary, percent in sorted((canaries or {}).items())} or None
    values = {"version": version, "canaries": shares, "revision": revision, "updated_at": now}
    if before is None:
        tx.execute(insert(aliases).values(adapter_id=adapter_id, alias=alias, **values))
    else:
        tx.execute(update(aliases).where(row).values(values))
    tx.execute(
        insert(alias_history).values(
            adapter_id=adapter_id,
            alias=alias,
            revision=revision,
            version=version,
            canaries=shares,
            back_to=back_to,
            at=now,
        )
    )
    return revision, now


def advance_latest(tx: Connection, adapter_id: int, version: int, status: str, now: float) -> None:
    """Point `latest` at a version that is ready, unless it points at a newer one."""
    latest = find_alias(tx, adapter_id, LATEST)
    if status == "ready" and (latest is None or latest.version < version):
        point(tx, adapter_id, LATEST, version, now)


def roll_back(
    tx: Connection, tenant: str, name: str, current: AliasRecord, adapter_id: int, now: float
) -> tuple[int, int, float]:
    """Take an alias's last step back: end its canary, or else return to the main version before this one.

    Versions that were deleted since are passed over. Returns (version, revision, time). Raises Conflict where there
    is nothing to return to.
    """
    at = _move(tx, adapter_id, current.alias, current.revision)
    version, back_to = current.version, at.back_to
    if not current.canaries:
        while True:
            if back_to is None:
                raise Conflict(
                    f"The alias {current.alias!r} of {name!r} has no earlier version that is still there.",
                    param="alias",
                    remedy="Choose a version with `deltamux adapters promote`.",
                )
            earlier = _move(tx, adapter_id, current.alias, back_to)
            back_to = earlier.back_to
            if earlier.version not in (None, current.version) and _is_ready(
                tx, tenant, name, earlier.version
            ):
                version = earlier.version
                break
    revision, moved_at = point(tx, adapter_id, current.alias, version, now, back_to=back_to, rolls_back=True)
    return version, revision, moved_at


def history(tx: Connection, adapter_id: int, alias: str, *, limit: int) -> tuple[AliasMove, ...]:
    """The newest `limit` moves of an alias, newest first."""
    mine = and_(alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias)
    query = select(alias_history).where(mine).order_by(alias_history.c.revision.desc()).limit(limit)
    return tuple(
        AliasMove(row.alias, row.revision, row.version, _shares(row.canaries), row.at)
        for row in tx.execute(query)
    )


def require_alias(tx: Connection, name: str, adapter_id: int, alias: str) -> AliasRecord:
    """Where an alias points. Raises NotFound where it is not set."""
    found = find_alias(tx, adapter_id, alias)
    if found is None:
        raise NotFound(f"{name!r} has no alias {alias!r}.", param="alias")
    return found


def check_revision(current: AliasRecord | None, name: str, alias: str, expected: int | None) -> None:
    """Raises Conflict where an alias is not at the revision that its mover has seen (0: not set, None: whatever)."""
    if expected in (None, current.revision if current else 0):
        return
    state = f"at revision {current.revision}, version {current.version}" if current else "not set"
    raise Conflict(
        f"The alias {alias!r} of {name!r} is {state}; expected revision {expected}.",
        param="expected_revision",
        remedy="Read the alias, decide again, and send its present revision (0: not set).",
    )


def in_use_by(tx: Connection, adapter_id: int, version: int) -> tuple[set[str], set[str]]:
    """(aliases whose main version this is, aliases whose canary it is)."""
    rows = tx.execute(select(aliases).where(aliases.c.adapter_id == adapter_id)).all()
    mains = {row.alias for row in rows if row.version == version}
    return mains, {row.alias for row in rows if row.version and version in _shares(row.canaries)}


def require_ready(
    tx: Connection, tenant: str, name: str, wanted: Iterable[int]
) -> tuple[int, list[VersionRecord]]:
    """The adapter's id and these versions, which an alias may point to. Raises NotFound, Conflict."""
    found = [require_version(tx, tenant, name, version) for version in wanted]
    return found[0][0], [ready(record) for _, record in found]


def ready(record: VersionRecord) -> VersionRecord:
    """`record`, if an alias may point to it. Raises Conflict."""
    if record.status != "ready":
        raise Conflict(
            f"Version {record.version} of {record.name!r} is {record.status}; an alias points to a ready one.",
            param="version",
        )
    return record


def _is_ready(tx: Connection, tenant: str, name: str, version: int) -> bool:
    try:
        return require_version(tx, tenant, name, version)[1].status == "ready"
    except NotFound:  # deleted since
        return False


def _move(tx: Connection, adapter_id: int, alias: str, revision: int) -> Row[Any]:
    mine = and_(alias_history.c.adapter_id == adapter_id, alias_history.c.alias == alias)
    return tx.execute(select(alias_history).where(mine, alias_history.c.revision == revision)).one()


def _shares(stored: Mapping[str, int] | None) -> dict[int, int]:
    return {int(version): percent for version, percent in (stored or {}).items()}
