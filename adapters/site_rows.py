"""What a site map is made of: one row per module of an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""A transformers config as a mapping."""


@dataclass(frozen=True, slots=True)
class Row:
    """One module: path template, the site it reads (None: token ids), the sites it writes.

    `optional`: not every model of the architecture has it.
    """

    path: str
    read: str | None
    writes: tuple[str, ...]
    optional: bool = False


SiteMap = tuple[Row, ...] | Callable[[Config], tuple[Row, ...]]
"""The rows of an architecture, the token embedding first, or what makes them of its config."""


@dataclass(frozen=True, slots=True)
class Required:
    """A config value that a map is written for, and what another one would break."""

    value: object
    why: str
