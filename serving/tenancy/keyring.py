"""Keys: made, rotated and revoked by administrators, looked up for every request."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, exists, insert, select, update

from adapters import audit
from adapters.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from adapters.migrations.access import api_keys, tenants
from adapters.migrations.database import Database
from serving.tenancy.keys import NewKey, hash_of, id_of, make_key
from serving.tenancy.principal import Principal, Scope, check_globs
from serving.tenancy.tenants import limits_of, require_tenant

MAX_LABEL_CHARS = 200
_LIMITS = ("requests_per_min", "tokens_per_min", "max_concurrency", "weight", "service_class")
_CREDENTIALS = select(
    api_keys, tenants.c.disabled_at, *(tenants.c[name] for name in _LIMITS)
).join_from(api_keys, tenants, api_keys.c.tenant == tenants.c.name)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the server knows of a key. Times are Unix seconds; `adapters` are globs, none meaning every delta."""

    id: str
    tenant: str
    label: str
    scopes: tuple[Scope, ...]
    adapters: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class Keyring:
    """Every key, in the registry's database. Thread-safe; blocks.

    Every method raises RegistryUnavailable where the database fails. `secret`: see `keys`. `actor`: as in
    `audit.Entry`.
    """

    def __init__(self, database: Database, secret: bytes, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._secret = secret
        self._clock = clock
        self._any = False

    def any(self) -> bool:
        """Whether there has ever been a key. Rows are never removed, so a revoked last key does not open the server."""
        if not self._any:
            with self._database.read() as tx:
                self._any = bool(tx.scalar(select(exists().select_from(api_keys))))
        return self._any

    def authenticate(self, text: str | None) -> Principal:
        """The caller who shows the key `text`. One query. Raises Unauthenticated."""
        key_id = id_of(text or "")
        if text is None or key_id is None:
            raise Unauthenticated(
                "No API key was given." if not text else "What was given is not an API key of this server.",
                remedy="Send it as Authorization: Bearer dmx_...",
            )
        with self._database.read() as tx:
            row = tx.execute(_CREDENTIALS.where(api_keys.c.id == key_id)).one_or_none()
        shown = hash_of(text, self._secret)
        if row is None or not hmac.compare_digest(row.hash, shown):
            raise Unauthenticated("The API key is not valid.", remedy="Ask the operator for another.")
        # from here on the caller is who it says, and may know why it is refused
        if row.revoked_at is not None:
            raise Unauthenticated("The API key was revoked.", remedy="Ask the operator for another.")
        if row.expires_at is not None and row.expires_at <= self._clock():
            raise Unauthenticated("The API key has expired.", remedy="Ask the operator for another.")
        if row.disabled_at is not None:
            raise Unauthenticated(f"The tenant {row.tenant!r} is disabled.", remedy="Ask the operator.")
        return Principal(
            tenant=row.tenant,
            key_id=row.id,
            scopes=frozenset(map(Scope, row.scopes)),
            globs=tuple(row.adapters),
            limits=limits_of(row),
        )

    def open_principal(self, tenant: str) -> Principal:
        """The caller of a server without keys: `tenant`, with every scope. Raises NotFound."""
        with self._database.read() as tx:
            limits = require_tenant(tx, tenant).limits
        return Principal(tenant=tenant, key_id="", scopes=frozenset(Scope), globs=(), limits=limits)

    def create(
        self,
        tenant: str,
        scopes: Sequence[Scope],
        *,
        actor: str,
        adapters: Sequence[str] = (),
        label: str = "",
        lifetime_s: float | None = None,
    ) -> tuple[KeyRecord, NewKey]:
        """Make a key, which ends after `lifetime_s` seconds. Raises NotFound for the tenant, InvalidRequest."""
        if not scopes:
            raise InvalidRequest("scopes: got none, expected at least one.", param="scopes")
        if Scope.ADMIN in scopes and adapters:  # it could make itself a key without them
            raise InvalidRequest(
                "adapters: a key with the scope admin reaches every delta, so it takes none.",
                param="adapters",
            )
        if len(label) > MAX_LABEL_CHARS or not label.isprintable():
            raise InvalidRequest(
                f"label: expected at most {MAX_LABEL_CHARS} printable characters.", param="label"
            )
        now = self._clock()
        expires_at = None if lifetime_s is None else now + lifetime_s
        ordered = tuple(scope for scope in Scope if scope in scopes)
        with self._database.write() as tx:
            require_tenant(tx, tenant)
            made = make_key()
            globs = tuple(check_globs(list(adapters)))
            record = KeyRecord(made.id, tenant, label, ordered, globs, now, expires_at, None)
            self._insert(tx, record, made, actor, "key.create", {})
        return record, made

    def rotate(self, key_id: str, *, overlap_s: float, actor: str) -> tuple[KeyRecord, NewKey]:
        """Make a key that may do what `key_id` may, which ends in `overlap_s` seconds or when it would have.

        The new one lives as long as the old one was made for. Raises NotFound, and Conflict where the old one has
        ended.
        """
        now = self._clock()
        with self._database.write() as tx:
            old = _require(tx, key_id)
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise Conflict(f"The key {key_id} has ended.", param="key", remedy="Make a new one.")
            expires_at = None if old.expires_at is None else now + old.expires_at - old.created_at
            made = make_key()
            record = KeyRecord(
                made.id, old.tenant, old.label, old.scopes, old.adapters, now, expires_at, None
            )
            self._insert(tx, record, made, actor, "key.rotate", {"replaces": key_id, "overlap_s": overlap_s})
            ends_at = now + overlap_s if old.expires_at is None else min(now + overlap_s, old.expires_at)
            tx.execute(update(api_keys).where(api_keys.c.id == key_id).values(expires_at=ends_at))
        return record, made

    def revoke(self, key_id: str, *, actor: str) -> KeyRecord:
        """End a key now; once more changes nothing. Raises NotFound."""
        with self._database.write() as tx:
            record = _require(tx, key_id)
            if record.revoked_at is None:
                now = self._clock()
                tx.execute(update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=now))
                audit.append(tx, audit.Entry(now, actor, "key.revoke", record.tenant, key_id, {}))
            return _require(tx, key_id)

    def list(self, tenant: str | None = None) -> list[KeyRecord]:
        """Every key, of one tenant or of all, in the order in which they were made."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if tenant is not None:
            query = query.where(api_keys.c.tenant == tenant)
        with self._database.read() as tx:
            return [_record(row) for row in tx.execute(query)]

    def _insert(
        self,
        tx: Connection,
        record: KeyRecord,
        made: NewKey,
        actor: str,
        action: str,
        more: dict[str, object],
    ) -> None:
        row = {
            "id": record.id,
            "tenant": record.tenant,
            "hash": hash_of(made.text, self._secret),
            "label": record.label,
            "scopes": list(record.scopes),
            "adapters": list(record.adapters),
            "created_at": record.created_at,
            "expires_at": record.expires_at,
        }
        tx.execute(insert(api_keys).values(row))
        shown = ("scopes", "adapters", "expires_at")
        details = {name: row[name] for name in shown} | more
        audit.append(tx, audit.Entry(record.created_at, actor, action, record.tenant, record.id, details))


def _require(tx: Connection, key_id: str) -> KeyRecord:
    row = tx.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound("There is no key with this id.", param="key", remedy="See `deltamux keys list`.")
    return _record(row)


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id,
        row.tenant,
        row.label,
        tuple(map(Scope, row.scopes)),
        tuple(row.adapters),
        row.created_at,
        row.expires_at,
        row.revoked_at,
    )
