"""Who may sign a tenant's uploads, and whether they must be signed. Without a word of the tenant's they need not be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from adapters import audit
from adapters.errors import Conflict, InvalidRequest, InvalidSignature, NotFound
from adapters.migrations.access import signers, tenants
from adapters.migrations.database import Database
from adapters.signing import is_signed_by, read_public_key, signer_id
from serving.tenancy.tenants import require_tenant

MAX_SIGNERS = 32
_SIGNER_ID = re.compile(r"[0-9a-f]{16}")
MAX_LABEL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Signer:
    """A public key (64 hex digits) whose signatures a tenant accepts. Times are Unix seconds."""

    id: str
    public_key: str
    label: str
    created_at: float
    revoked_at: float | None


class Signers:
    """Every tenant's signers, in the registry's database. Thread-safe; blocks.

    Every method raises RegistryUnavailable where the database fails. `actor`: as in `audit.Entry`.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def add(self, tenant: str, public_key: str, *, label: str = "", actor: str) -> Signer:
        """Accept the signatures of a public key, in PEM or hex.

        Raises InvalidRequest, NotFound for the tenant, Conflict where the key is there or was revoked, or there are
        too many.
        """
        if len(label) > MAX_LABEL_CHARS or not label.isprintable():
            raise InvalidRequest(
                f"label: expected at most {MAX_LABEL_CHARS} printable characters.", param="label"
            )
        raw = read_public_key(public_key)
        made = Signer(signer_id(raw), raw, label, self._clock(), None)
        with self._database.write() as tx:
            require_tenant(tx, tenant)
            mine = signers.c.tenant == tenant
            if tx.scalar(select(signers.c.id).where(mine, signers.c.id == made.id)) is not None:
                raise Conflict(f"The signer {made.id} is there already, or was revoked.", param="public_key")
            if (
                tx.scalar(select(func.count()).where(mine, signers.c.revoked_at.is_(None))) or 0
            ) >= MAX_SIGNERS:
                raise Conflict(f"A tenant has at most {MAX_SIGNERS} signers.", param="public_key")
            row = {"id": made.id, "public_key": raw, "label": label, "created_at": made.created_at}
            tx.execute(insert(signers).values(tenant=tenant, **row))
            self._log(tx, actor, "signer.add", tenant, made.id)
        return made

    def list(self, tenant: str) -> list[Signer]:
        """Every signer of a tenant, revoked ones too, in the order in which they came."""
        with self._database.read() as tx:
            return _signers(tx, tenant)

    def revoke(self, tenant: str, signer: str, *, actor: str) -> None:
        """Accept no further signature of a signer; what it has signed stays. Raises NotFound."""
        if not _SIGNER_ID.fullmatch(signer):  # PostgreSQL takes no text with a NUL
            raise NotFound("There is no such signer.", param="signer")
        with self._database.write() as tx:
            mine = update(signers).where(signers.c.tenant == tenant, signers.c.id == signer)
            if not tx.execute(mine.values(revoked_at=self._clock())).rowcount:
                raise NotFound("There is no such signer.", param="signer")
            self._log(tx, actor, "signer.revoke", tenant, signer)

    def is_required(self, tenant: str) -> bool:
        """Whether a tenant takes signed uploads only."""
        with self._database.read() as tx:
            return _is_required(tx, tenant)

    def require(self, tenant: str, required: bool, *, actor: str) -> None:
        """Take signed uploads only, or any. Raises NotFound for the tenant."""
        with self._database.write() as tx:
            require_tenant(tx, tenant)
            now = self._clock()
            values = {"signatures_required_at": now if required else None}
            tx.execute(update(tenants).where(tenants.c.name == tenant).values(values))
            self._log(tx, actor, "signer.require" if required else "signer.optional", tenant, tenant)

    def check(self, tenant: str, digest: str, signature: str | None) -> dict[str, Any]:
        """What the proof says of an upload's signature, as `{"signature": ...}`; nothing for an unsigned one.

        Raises InvalidSignature where the tenant wants one and there is none, and for one of no signer of its.
        """
        with self._database.read() as tx:
            required = _is_required(tx, tenant)
            known = [signer for signer in _signers(tx, tenant) if signer.revoked_at is None]
        if signature is None:
            if required:
                raise InvalidSignature(
                    f"signature: the tenant {tenant!r} takes signed uploads only.",
                    param="signature",
                    remedy="Send one with `deltamux push --sign KEY`.",
                )
            return {}
        for signer in known:
            if is_signed_by(signer.public_key, digest, signature):
                facts = {"signer": signer.id, "public_key": signer.public_key, "label": signer.label}
                return {"signature": {**facts, "signature": signature}}
        raise InvalidSignature(
            f"signature: not that of sha256:{digest} by any of the tenant's {len(known)} signers.",
            param="signature",
            remedy="Sign these files, with a key whose public half `deltamux signers list` shows.",
        )

    def _log(self, tx: Connection, actor: str, action: str, tenant: str, subject: str) -> None:
        audit.append(tx, audit.Entry(self._clock(), actor, action, tenant, subject, {}))


def _signers(tx: Connection, tenant: str) -> list[Signer]:
    query = select(signers).where(signers.c.tenant == tenant).order_by(signers.c.created_at, signers.c.id)
    return [
        Signer(row.id, row.public_key, row.label, row.created_at, row.revoked_at) for row in tx.execute(query)
    ]


def _is_required(tx: Connection, tenant: str) -> bool:
    return tx.scalar(select(tenants.c.signatures_required_at).where(tenants.c.name == tenant)) is not None
