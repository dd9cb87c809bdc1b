"""The grammar of names and of model references.

    reference = [ tenant "/" ] name [ ":" alias | "@v" version | "@sha256:" digest ]
    tenant, name, alias = [a-z0-9][a-z0-9._-]{0,62}, without ".."
    version = a positive integer of at most nine digits, without leading zeros
    digest = 64 lower-case hex digits

A text has at most one reading, and `parse(str(reference)) == reference`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapters.errors import InvalidReference

LATEST = "latest"
"""The alias that a bare name means."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")  # nine digits: fits a 32-bit column in any database
MAX_VERSION = 999_999_999
_DIGEST = re.compile(r"[0-9a-f]{64}")
_EXCERPT_CHARS = 40
_EXPECTED_NAME = (
    "1 to 63 characters out of a-z, 0-9, '.', '_' and '-', starting with a letter or digit, without '..'"
)
_EXPECTED_REFERENCE = "[<tenant>/]<name>[:<alias>|@v<integer>|@sha256:<64 hex digits>]"


def excerpt(text: str) -> str:
    """The first 40 characters of `text` quoted for an error message: ASCII, control characters escaped."""
    if len(quoted := ascii(text[: _EXCERPT_CHARS + 1])) <= _EXCERPT_CHARS + 2:
        return quoted
    return f"{quoted[:_EXCERPT_CHARS]}... ({len(text)} characters)"


def check_name(text: str, *, what: str = "name") -> str:
    """`text` if it is a legal tenant, name or alias (`what` says which). Raises InvalidReference."""
    if _NAME.fullmatch(text) and ".." not in text:
        return text
    raise InvalidReference(f"The {what} {excerpt(text)} is malformed; expected {_EXPECTED_NAME}.", param=what)


def check_digest(text: str) -> str:
    """`text` if it is 64 lower-case hex digits, and so safe as a file name. Raises InvalidReference."""
    if _DIGEST.fullmatch(text):
        return text
    raise InvalidReference(
        f"The digest {excerpt(text)} is malformed; expected 64 lower-case hex digits.", param="digest"
    )


@dataclass(frozen=True, slots=True)
class ModelReference:
    """What a caller asked for: a name and exactly one of alias, version, digest (none given: alias `latest`).

    `tenant` is None where the caller named none. `digest` is bare hex. Every field is checked, so a value of
    this type is well-formed however it was made. Raises InvalidReference.
    """

    tenant: str | None
    name: str
    alias: str | None = None
    version: int | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        if self.tenant is not None:
            check_name(self.tenant, what="tenant")
        check_name(self.name)
        match self.alias, self.version, self.digest:
            case None, None, None:
                object.__setattr__(self, "alias", LATEST)
            case str(alias), None, None:
                check_name(alias, what="alias")
            case None, int(version), None:
                if not 1 <= version <= MAX_VERSION:
                    raise InvalidReference(
                        f"The version {version} is out of range; expected 1 to {MAX_VERSION}.",
                        param="version",
                    )
            case None, None, str(digest):
                check_digest(digest)
            case _:
                raise InvalidReference(
                    "A model reference takes one of alias, version and digest; got more than one.",
                    param="model",
                )

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Read `text` as the grammar above says. Raises InvalidReference for anything else."""
        tenant, slash, body = text.partition("/")
        try:
            return cls._parse_body(tenant, body) if slash else cls._parse_body(None, text)
        except InvalidReference as error:
            raise InvalidReference(
                f"The model reference is malformed. {error.message}",
                param="model",
                remedy=f"Write {_EXPECTED_REFERENCE}.",
            ) from None

    @classmethod
    def _parse_body(cls, tenant: str | None, body: str) -> ModelReference:
        name, at, pin = body.partition("@")
        if not at:
            name, colon, alias = body.partition(":")
            return cls(tenant, name, alias=alias if colon else LATEST)
        if version := _VERSION.fullmatch(pin):
            return cls(tenant, name, version=int(version[1]))
        if pin.startswith("sha256:"):
            return cls(tenant, name, digest=pin.removeprefix("sha256:"))
        raise InvalidReference(
            f"What follows '@' is {excerpt(pin)}; expected v<integer> or sha256:<64 hex digits>."
        )

    def __str__(self) -> str:
        prefix = f"{self.tenant}/" if self.tenant is not None else ""
        if self.version is not None:
            return f"{prefix}{self.name}@v{self.version}"
        if self.digest is not None:
            return f"{prefix}{self.name}@sha256:{self.digest}"
        return f"{prefix}{self.name}" if self.alias == LATEST else f"{prefix}{self.name}:{self.alias}"
