"""The registry against a dictionary: every call, in any order, must do and refuse what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.collector import Collector
from adapters.errors import Conflict, DeltamuxError, InvalidRequest, NotFound, StoreError
from adapters.names import ModelReference
from adapters.registry import DEFAULT_TENANT, Registry, Status

NAMES, ALIASES = ("a", "b"), ("latest", "prod")
DIGESTS = ("a" * 64, "b" * 64, "c" * 64)
T = DEFAULT_TENANT
some_name, some_digest, some_alias = map(st.sampled_from, (NAMES, DIGESTS, ALIASES))
some_version, some_revision = st.integers(1, 5), st.none() | st.integers(0, 4)
some_canaries = st.just({}) | st.dictionaries(st.integers(1, 5), st.integers(1, 60), max_size=2)


@dataclass
class Expected:
    """A name as the model of the registry has it."""

    versions: dict[int, tuple[str, str]] = field(default_factory=dict)  # live: number -> (digest, status)
    deleted: dict[int, tuple[str, str]] = field(default_factory=dict)
    used: int = 0
    aliases: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    canaries: dict[str, dict[int, int]] = field(default_factory=dict)
    back: dict[str, Any] = field(
        default_factory=dict
    )  # the versions that rollbacks return to, the next one first

    def point(self, alias: str, version: int | None, canaries: dict[int, int] | None = None) -> None:
        before = self.aliases.get(alias)
        if before is None:
            self.back[alias] = None
        elif before != version:
            self.back[alias] = (before, self.back[alias])
        self.move(alias, version, canaries or {})

    def move(self, alias: str, version: int | None, canaries: dict[int, int]) -> None:
        self.revisions[alias] = self.revisions.get(alias, 0) + 1
        self.aliases.pop(alias, None)
        self.canaries[alias] = canaries
        if version is not None:
            self.aliases[alias] = version

    def roll_back(self, alias: str) -> bool:
        back, version = self.back[alias], self.aliases[alias]
        while not self.canaries[alias]:
            if back is None:
                return False
            earlier, back = back
            if earlier != version and self.versions.get(earlier, ("", ""))[1] == "ready":
                version = earlier
                break
        self.back[alias] = back
        self.move(alias, version, {})
        return True

    def same(self, digest: str) -> list[int]:
        """The live version that has this content and did not fail."""
        return [n for n, (d, s) in self.versions.items() if d == digest and s != "failed"]


class Digests:
    """A store that remembers only which digests it has."""

    def __init__(self) -> None:
        self.stored: set[str] = set()

    def iter_digests(self) -> Iterator[str]:
        return iter(sorted(self.stored))

    def delete(self, digest: str) -> None:
        self.stored.discard(digest)


class RegistryMachine(RuleBasedStateMachine):
    """Subclasses say how to make an empty database."""

    make_url: Callable[[], str]

    @initialize()
    def open(self) -> None:
        self.url = type(self).make_url()
        self.registry = Registry(self.url)
        self.store = Digests()
        self.model = {name: Expected() for name in NAMES}
        self.gone: set[str] = set()

    def teardown(self) -> None:
        self.registry.close()

    @rule()
    def reopen(self) -> None:
        self.registry.close()
        self.registry = Registry(self.url)

    @rule(
        name=some_name,
        digest=some_digest,
        status=st.sampled_from(["ready", "ready", "validating", "failed"]),
        held=st.booleans(),
    )
    def publish(self, name: str, digest: str, status: Status, held: bool) -> None:
        model = self.model[name]
        hold = self.registry.blobs.hold(digest, 3600) if held else None
        if held or digest not in self.gone:
            self.store.stored.add(digest)

        def publish() -> Any:
            return self.registry.publish(
                T, name, digest, method="LORA", backbone_digest="", task="causal-lm", size_bytes=1, labels={},
                proof={}, status=status, hold=hold,
            )  # fmt: skip

        if digest in self.gone and not held:
            self.attempt(StoreError, publish)
            return
        record = publish()
        self.gone.discard(digest)
        if same := model.same(digest):
            assert ([record.version], record.republished) == (same, True)
            return
        model.used += 1
        assert (record.version, record.republished) == (model.used, False)
        model.versions[model.used] = (digest, status)
        if status == "ready":
            model.point("latest", model.used)

    @rule(name=some_name, version=some_version, status=st.sampled_from(["ready", "failed"]))
    def finish_validation(self, name: str, version: int, status: Any) -> None:
        model = self.model[name]
        known = model.versions.get(version)
        error = NotFound if known is None else None if known[1] == "validating" else Conflict
        if self.attempt(error, lambda: self.registry.finish_validation(T, name, version, status, proof={})):
            assert known is not None
            model.versions[version] = (known[0], status)
            self.advance(model, version)

    @rule(
        name=some_name,
        alias=some_alias,
        version=some_version,
        expected=some_revision,
        canaries=some_canaries,
    )
    def set_alias(
        self, name: str, alias: str, version: int, expected: int | None, canaries: dict[int, int]
    ) -> None:
        model = self.model[name]
        current = model.revisions[alias] if alias in model.aliases else 0
        error: type[DeltamuxError] | None = None
        named = (version, *canaries)
        first_wrong = next((n for n in named if model.versions.get(n, ("", ""))[1] != "ready"), None)
        if version in canaries or sum(canaries.values()) >= 100:
            error = InvalidRequest
        elif not set(named) <= set(model.versions):
            error = NotFound
        elif first_wrong is not None or expected not in (None, current):
            error = Conflict
        if self.attempt(
            error,
            lambda: self.registry.set_alias(
                T, name, alias, version, canaries=canaries, expected_revision=expected
            ),
        ):
            model.point(alias, version, canaries)

    @rule(name=some_name, alias=some_alias, expected=some_revision)
    def roll_back_alias(self, name: str, alias: str, expected: int | None) -> None:
        model = self.model[name]
        error: type[DeltamuxError] | None = None
        if alias not in model.aliases:
            error = NotFound
        elif expected not in (None, model.revisions[alias]) or not model.roll_back(alias):
            error = Conflict
        self.attempt(error, lambda: self.registry.roll_back_alias(T, name, alias, expected_revision=expected))

    @rule(name=some_name, version=some_version)
    def delete_version(self, name: str, version: int) -> None:
        model = self.model[name]
        held = {alias for alias, target in model.aliases.items() if target == version}
        tried = any(version in model.canaries[alias] for alias in model.aliases)
        in_use = tried or bool(held - {"latest"})
        error = NotFound if version not in model.versions else Conflict if in_use else None
        if self.attempt(error, lambda: self.registry.delete_version(T, name, version)):
            model.deleted[version] = model.versions.pop(version)
            if "latest" in held:
                model.point(
                    "latest", max((n for n, (_, s) in model.versions.items() if s == "ready"), default=None)
                )

    @rule(name=some_name)
    def delete_adapter(self, name: str) -> None:
        model = self.model[name]
        error = None if model.versions else NotFound
        if self.attempt(error, lambda: self.registry.delete_adapter(T, name)):
            model.deleted |= model.versions
            model.versions.clear()
            for alias in list(model.aliases):
                model.point(alias, None)

    @rule(name=some_name, version=some_version)
    def undelete_version(self, name: str, version: int) -> None:
        model = self.model[name]
        error: type[DeltamuxError] | None = None
        if version not in model.deleted:
            error = NotFound
        elif model.deleted[version][1] != "failed" and model.same(model.deleted[version][0]):
            error = Conflict
        elif model.deleted[version][0] in self.gone:
            error = StoreError
        if self.attempt(error, lambda: self.registry.undelete_version(T, name, version)):
            model.versions[version] = model.deleted.pop(version)
            self.advance(model, version)

    @rule()
    def collect(self) -> None:
        unused = set(self.store.stored) - self.live()
        swept = Collector(self.registry, self.store, grace_s=0).collect().swept  # type: ignore[arg-type]
        assert swept == len(unused)
        self.gone |= unused

    def advance(self, model: Expected, version: int) -> None:
        if model.versions[version][1] == "ready" and model.aliases.get("latest", 0) < version:
            model.point("latest", version)

    def live(self) -> set[str]:
        return {digest for model in self.model.values() for digest, _ in model.versions.values()}

    def attempt(self, error: type[DeltamuxError] | None, action: Callable[[], object]) -> bool:
        if error is None:
            action()
            return True
        with pytest.raises(error):
            action()
        return False

    @invariant()
    def agrees(self) -> None:
        live = {name: model for name, model in self.model.items() if model.versions}
        listed = {item.name: item for item in self.registry.list_adapters(T).items}
        assert set(listed) == set(live)
        for name, model in live.items():
            records = self.registry.list_versions(T, name)
            assert {r.version: (r.digest, r.status) for r in records} == model.versions
            got = {a.alias: (a.version, a.revision, a.canaries) for a in listed[name].aliases}
            assert got == {
                alias: (target, model.revisions[alias], model.canaries[alias])
                for alias, target in model.aliases.items()
            }
            for alias, target in model.aliases.items():
                assert self.registry.resolve(ModelReference(None, name, alias=alias)).version == target
        assert self.registry.live_digests() == self.live() <= self.store.stored
