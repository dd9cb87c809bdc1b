"""Idempotency keys: a request that is sent again under its key gets the first one's answer.

A key belongs to a tenant and to one request, of which a fingerprint is kept. The first to come claims it; its answer
is recorded if it is a success, and otherwise the claim is given up, so that the key can be used again. A claim whose
holder was killed ends by itself; the next request under the key is carried out anew.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, insert, select, update

from adapters.errors import IdempotencyKeyReused, InProgress
from adapters.migrations.database import Database
from adapters.migrations.uploads import idempotency_keys

_KEYS = idempotency_keys.c


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded success. `body` is JSON; `adapter_digest` is the header of this name, None without one."""

    status: int
    body: str
    adapter_digest: str | None


class IdempotencyKeys:
    """The keys in a registry's database. Thread-safe; blocks. Every method raises RegistryUnavailable."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def claim(self, tenant: str, key: str, fingerprint: str, seconds: float) -> str | Answer:
        """The recorded answer of the same request, or the id of a claim that holds for so long.

        Raises IdempotencyKeyReused for another request's key, InProgress while the first one is not answered.
        """
        now, claim = self._clock(), uuid.uuid4().hex
        mine = and_(_KEYS.tenant == tenant, _KEYS.key == key)
        with self._database.write() as tx:
            tx.execute(delete(idempotency_keys).where(_KEYS.expires_at <= now))
            row = tx.execute(select(idempotency_keys).where(mine)).one_or_none()
            if row is None:
                values = {"tenant": tenant, "key": key, "fingerprint": fingerprint, "claim": claim}
                tx.execute(insert(idempotency_keys).values(**values, expires_at=now + seconds))
                return claim
        if row.fingerprint != fingerprint:
            raise IdempotencyKeyReused(
                "This idempotency key was used for another request.",
                param="idempotency-key",
                remedy="Make a new key for each request, and keep it when the same request is sent again.",
            )
        if row.status is None:
            raise InProgress(
                "The request with this idempotency key is still being carried out.",
                param="idempotency-key",
                remedy="Try again shortly.",
            )
        return Answer(row.status, row.body, row.adapter_digest)

    def record(self, tenant: str, key: str, claim: str, answer: Answer, seconds: float) -> None:
        """Keep the answer of the request that holds the claim, for so long."""
        values = {
            "status": answer.status,
            "body": answer.body,
            "adapter_digest": answer.adapter_digest,
            "expires_at": self._clock() + seconds,
        }
        with self._database.write() as tx:
            tx.execute(update(idempotency_keys).where(self._held(tenant, key, claim)).values(values))

    def give_up(self, tenant: str, key: str, claim: str) -> None:
        """Let the key be used again: its request has changed nothing."""
        with self._database.write() as tx:
            tx.execute(delete(idempotency_keys).where(self._held(tenant, key, claim)))

    @staticmethod
    def _held(tenant: str, key: str, claim: str) -> ColumnElement[bool]:
        return and_(_KEYS.tenant == tenant, _KEYS.key == key, _KEYS.claim == claim)
