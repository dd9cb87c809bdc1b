"""The caller of one request, as everything behind authentication sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from adapters.errors import InvalidRequest
from serving.core import ServiceClass

MAX_GLOBS = 32
BOUNDS = (
    "requests_per_min",
    "tokens_per_min",
    "max_concurrency",
    "max_stored_bytes",
    "max_adapters",
    "max_versions",
    "max_files",
)
"""The fields of `Limits` that are numbers of something, or null."""
_GLOB = re.compile(r"([a-z0-9*][a-z0-9*._-]{0,62}/)?[a-z0-9*][a-z0-9*._-]{0,62}")


class Scope(StrEnum):
    """What a key may do. ADMIN includes the others and reaches every tenant."""

    INFER = "infer"
    UPLOAD = "upload"
    MANAGE = "manage"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A tenant's bounds (None: none) and its standing in the queue.

    `tokens_per_min` counts prompt and generated tokens, `max_concurrency` the requests in progress. What it may keep
    (`max_stored_bytes`, `max_adapters`, `max_versions`, `max_files`) is as in `Quota`; there None is what the
    server's settings say. Raises InvalidRequest naming the field that is out of range.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    max_concurrency: int | None = None
    max_stored_bytes: int | None = None
    max_adapters: int | None = None
    max_versions: int | None = None
    max_files: int | None = None
    weight: float = 1.0
    service_class: ServiceClass = ServiceClass.STANDARD

    def __post_init__(self) -> None:
        for name in BOUNDS:
            value, bits = getattr(self, name), 63 if name.endswith("_bytes") else 31
            if value is not None and not 1 <= value < 1 << bits:
                raise InvalidRequest(
                    f"{name}: got {value}, expected 1 to {(1 << bits) - 1} or null.", param=name
                )
        if not 0.01 <= self.weight <= 100:
            raise InvalidRequest(f"weight: got {self.weight}, expected 0.01 to 100.", param="weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who calls: a tenant, by a key. `key_id` is empty where the server has no keys. `globs` empty: every delta."""

    tenant: str
    key_id: str
    scopes: frozenset[Scope]
    globs: tuple[str, ...]
    limits: Limits

    @property
    def actor(self) -> str:
        """This caller in the audit log."""
        return f"key:{self.key_id}" if self.key_id else "open"

    def may(self, scope: Scope) -> bool:
        """Whether the key has `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def reaches(self, owner: str, name: str) -> bool:
        """Whether the key's globs cover the delta `owner`/`name`. A glob without a tenant is about the caller's own."""
        if not self.globs:
            return True
        full = f"{owner}/{name}"
        return any(fnmatchcase(full, glob if "/" in glob else f"{self.tenant}/{glob}") for glob in self.globs)


def check_globs(globs: list[str]) -> list[str]:
    """`globs` if each is a name, or `tenant/name`, in which `*` stands for anything. Raises InvalidRequest."""
    if len(globs) > MAX_GLOBS or not all(_GLOB.fullmatch(glob) for glob in globs):
        raise InvalidRequest(
            f"adapters: expected at most {MAX_GLOBS} names or tenant/name pairs, in which * stands for anything.",
            param="adapters",
        )
    return globs
