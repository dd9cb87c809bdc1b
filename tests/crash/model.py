"""What a client may expect of the registry: the operations of the crash suite, and the state that they lead to."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import NotFound
from adapters.registry import Registry

Operation = tuple[Any, ...]
"""("upload", name, content, alias or None), ("alias", name, alias, version), ("delete_version", name, version),
("delete_adapter", name), ("undelete", name, version) or ("collect",)."""

NAMES = ("one", "two")
Snapshot = dict[str, tuple[dict[int, str], dict[str, int]]]
"""Name -> (version -> digest, alias -> version), for names that have a live version."""


@dataclass
class Name:
    """One adapter. `deleted` holds the versions whose deletion may still be undone."""

    digests: dict[int, str] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    aliases: dict[str, int] = field(default_factory=dict)

    def with_digest(self, digest: str) -> int | None:
        """The live version with this content."""
        return next((version for version in self.live if self.digests[version] == digest), None)


class Model:
    """One client's adapters; no other client changes them."""

    def __init__(self) -> None:
        self.names = {name: Name() for name in NAMES}

    def after(self, operation: Operation, digests: list[str]) -> Model:
        """The state when `operation` has succeeded in this one. `digests`: of the contents."""
        result = deepcopy(self)
        match operation:
            case ("upload", str(name), int(content), alias):
                result._upload(result.names[name], digests[content], alias)
            case ("alias", str(name), str(alias), int(version)):
                result.names[name].aliases[alias] = version
            case ("delete_version", str(name), int(version)):
                item = result.names[name]
                item.live.remove(version)
                item.deleted.add(version)
                if item.aliases.get("latest") == version:
                    del item.aliases["latest"]
                    if item.live:
                        item.aliases["latest"] = max(item.live)
            case ("delete_adapter", str(name)):
                item = result.names[name]
                item.deleted |= item.live
                item.live.clear()
                item.aliases.clear()
            case ("undelete", str(name), int(version)):
                item = result.names[name]
                item.deleted.remove(version)
                item.live.add(version)
                item.aliases["latest"] = max(version, item.aliases.get("latest", 0))
        return result

    def _upload(self, item: Name, digest: str, alias: str | None) -> None:
        version = item.with_digest(digest)
        if version is None:
            version = len(item.digests) + 1
            item.digests[version] = digest
            item.live.add(version)
            item.aliases["latest"] = version
        if alias is not None:
            item.aliases[alias] = version

    def forget_deleted(self) -> None:
        """Everything deleted is collected."""
        for item in self.names.values():
            item.deleted.clear()

    def snapshot(self) -> Snapshot:
        """What the registry must show."""
        return {
            name: ({version: item.digests[version] for version in item.live}, dict(item.aliases))
            for name, item in self.names.items()
            if item.live
        }

    def choose(self, random: random.Random, num_contents: int) -> Operation:
        """An operation that a working registry carries out in this state."""
        name = random.choice(NAMES)
        item = self.names[name]
        free = [v for v in item.live if v not in {t for a, t in item.aliases.items() if a != "latest"}]
        back = [v for v in item.deleted if item.with_digest(item.digests[v]) is None]
        choices: list[tuple[int, Operation]] = [(4, ("upload", name, random.randrange(num_contents), None))]
        choices += [(2, ("upload", name, random.randrange(num_contents), "prod")), (3, ("collect",))]
        if item.live:
            choices += [(2, ("alias", name, "prod", random.choice(sorted(item.live))))]
            choices += [(1, ("delete_adapter", name))]
        if free:
            choices += [(4, ("delete_version", name, random.choice(sorted(free))))]
        if back:
            choices += [(2, ("undelete", name, random.choice(sorted(back))))]
        weights, operations = zip(*choices, strict=True)
        return random.choices(operations, weights)[0]


def observed(registry: Registry, tenant: str) -> Snapshot:
    """What the registry shows of a tenant."""
    found: Snapshot = {}
    for name in NAMES:
        try:
            adapter = registry.get_adapter(tenant, name)
        except NotFound:
            continue
        versions = {
            record.version: record.digest for record in registry.list_versions(tenant, name, limit=200)
        }
        found[name] = (versions, {alias.alias: alias.version for alias in adapter.aliases})
    return found
