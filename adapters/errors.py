"""The exception tree of deltamux.

    DeltamuxError
    ├── InvalidRequest            the caller's input is wrong; nothing was done
    │   ├── InvalidReference      a model reference does not parse
    │   ├── ContextLengthExceeded prompt + max_tokens do not fit the backbone
    │   ├── InvalidSignature      an upload that is unsigned where it must be, or signed wrongly
    │   ├── InvalidDelta          an upload that can't be served exactly; lists every problem
    │   └── PayloadTooLarge       a body or file over its limit
    ├── Unauthenticated           no key, or one that is not valid
    ├── Forbidden                 the key is valid and its scopes do not cover this
    ├── NotFound                  no such model, version, alias or route
    ├── Conflict                  compare-and-swap lost, or the thing is in use
    ├── Overloaded                a bounded queue or budget is full; try again
    │   ├── RateLimited           the tenant has used its share for now; says when to try again
    │   └── QuotaExceeded         the request is more than the tenant's whole share; it can never pass
    ├── Unavailable               a part of the service is not there at present
    │   ├── StoreError            the blob store failed (disk full, I/O error)
    │   └── RegistryUnavailable   the database failed (locked, I/O error)
    └── BackboneRefused           the server can't start with this backbone

Every error says what, where, got, expected and the remedy. Messages carry no secrets and no server paths.
They cross process borders as `ErrorInfo`, never as pickled exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as plain values: class name, message, field, remedy; every problem of an upload; when to try again."""

    kind: str
    message: str
    param: str | None = None
    remedy: str | None = None
    problems: tuple[str, ...] = ()
    retry_after_s: float | None = None


class DeltamuxError(Exception):
    """Base of all errors that a caller can act on.

    `param` names the field at fault in the caller's terms; `remedy` says what to do.
    """

    def __init__(self, message: str, *, param: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message

    def info(self) -> ErrorInfo:
        """This error as values that cross a process border."""
        return ErrorInfo(type(self).__name__, self.message, self.param, self.remedy)


class InvalidRequest(DeltamuxError):
    """The caller's input is wrong."""


class InvalidReference(InvalidRequest):
    """A model reference does not follow `[tenant/]name[:alias|@vN|@sha256:hex]`."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt, virtual tokens and `max_tokens` do not fit the backbone's context."""


class InvalidDelta(InvalidRequest):
    """An upload that can't be served exactly. `problems` lists everything found, one sentence each."""

    def __init__(
        self, problems: Sequence[str], *, param: str | None = "adapter", remedy: str | None = None
    ) -> None:
        assert problems, "InvalidDelta needs at least one problem"
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        super().__init__(count + " | ".join(problems), param=param, remedy=remedy)
        self.problems = tuple(problems)

    def info(self) -> ErrorInfo:
        return ErrorInfo(type(self).__name__, self.message, self.param, self.remedy, self.problems)


class InvalidSignature(InvalidRequest):
    """An upload that is not signed though its tenant demands it, or whose signature is not a signer's."""


class PayloadTooLarge(InvalidRequest):
    """A body, file or header is over its limit."""


class Unauthenticated(DeltamuxError):
    """The caller showed no key, or one that is unknown, expired or revoked."""


class Forbidden(DeltamuxError):
    """The caller is known and its key does not allow this."""


class NotFound(DeltamuxError):
    """No such model, version or alias, or it is not visible to the caller."""


class Conflict(DeltamuxError):
    """A compare-and-swap lost, or the thing is still in use."""


class Overloaded(DeltamuxError):
    """A bounded queue or budget is full; the same request may pass after `retry_after_s`."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float = 1.0,
        param: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, param=param, remedy=remedy)
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        return replace(super().info(), retry_after_s=self.retry_after_s)


class RateLimited(Overloaded):
    """The tenant has used its share for now."""


class QuotaExceeded(Overloaded):
    """The request alone is more than the tenant's share; trying again does not help."""


class Unavailable(DeltamuxError):
    """A part of the service is not there at present."""


class StoreError(Unavailable):
    """The blob store failed; nothing became visible."""


class RegistryUnavailable(Unavailable):
    """The database failed; nothing became visible."""


class BackboneRefused(DeltamuxError):
    """The server can't serve this backbone exactly, so it does not start."""


def _tree(root: type[DeltamuxError]) -> dict[str, type[DeltamuxError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_info(info: ErrorInfo) -> DeltamuxError:
    """The exception that `info` describes; the inverse of `DeltamuxError.info`."""
    kind = _tree(DeltamuxError)[info.kind]
    if issubclass(kind, InvalidDelta):
        return kind(info.problems, param=info.param, remedy=info.remedy)
    if issubclass(kind, Overloaded) and info.retry_after_s is not None:
        return kind(info.message, retry_after_s=info.retry_after_s, param=info.param, remedy=info.remedy)
    return kind(info.message, param=info.param, remedy=info.remedy)
