"""Aliases that divide requests among versions: exact shares, stickiness, races, promotion and the way back."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, text

from adapters.aliases import version_at
from adapters.errors import Conflict, InvalidReference, InvalidRequest, NotFound
from adapters.names import ModelReference
from adapters.registry import DEFAULT_TENANT, Registry
from tests.unit.adapters.test_registry import publish

T = DEFAULT_TENANT
UNITS = [f"default/user/{number}" for number in range(2000)]


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    """Three ready versions of `sql`, the alias `prod` at the first."""
    with Registry(url, clock=lambda: 1_800_000_000.5) as opened:
        for digit in "abc":
            publish(opened, "sql", digit * 64)
        opened.set_alias(T, "sql", "prod", 1, expected_revision=0)
        yield opened


def served(registry: Registry, unit: str | None, alias: str = "prod") -> int:
    return registry.resolve(ModelReference(None, "sql", alias=alias), unit=unit).version


def split(registry: Registry, canaries: dict[int, int], version: int = 1) -> int:
    moved = registry.set_alias(T, "sql", "prod", version, canaries=canaries, expected_revision=None)
    return moved.revision


def test_the_share_of_each_version_is_what_the_hash_of_the_units_says(registry: Registry) -> None:
    split(registry, {2: 10, 3: 25})
    got = [served(registry, unit) for unit in UNITS[:400]]
    places = [
        int(hashlib.sha256(f'["default","sql","prod","{unit}"]'.encode()).hexdigest()[:16], 16) % 100
        for unit in UNITS
    ]
    expected = [2 if place < 10 else 3 if place < 35 else 1 for place in places]
    assert got == expected[:400]
    # fixed units, so fixed numbers: 10 % and 25 % of 2000, within three standard deviations
    assert Counter(expected) == {1: 1291, 2: 213, 3: 496}


def test_places_are_divided_exactly() -> None:
    assert Counter(version_at(place, 1, {3: 25, 2: 10}) for place in range(100)) == {1: 65, 2: 10, 3: 25}


def test_a_unit_stays_where_it_is_and_a_growing_canary_keeps_its_units(registry: Registry) -> None:
    units = UNITS[:100]
    on_canary: set[str] = set()
    for percent in (10, 30, 99):
        split(registry, {2: percent})
        now = {unit for unit in units if served(registry, unit) == 2}
        assert now == {unit for unit in units if served(registry, unit) == 2}
        assert on_canary < now
        on_canary = now
    split(registry, {}, version=2)
    assert {served(registry, unit) for unit in units} == {2}


def test_another_alias_divides_the_same_units_otherwise(registry: Registry) -> None:
    split(registry, {2: 50})
    registry.set_alias(T, "sql", "beta", 1, canaries={2: 50}, expected_revision=0)
    units = UNITS[:60]
    assert [served(registry, u) for u in units] != [served(registry, u, "beta") for u in units]


def test_without_a_unit_and_by_version_there_is_no_canary(registry: Registry) -> None:
    split(registry, {2: 99})
    assert served(registry, None) == 1
    assert registry.resolve(ModelReference(None, "sql", version=1), unit=UNITS[0]).version == 1


def test_an_adapter_shows_its_weights(registry: Registry) -> None:
    split(registry, {3: 5, 2: 10})
    shown = {alias.alias: alias.weights for alias in registry.get_adapter(T, "sql").aliases}
    assert shown == {"latest": {3: 100}, "prod": {1: 85, 2: 10, 3: 5}}


@pytest.mark.parametrize(
    "canaries", [{1: 10}, {2: 0}, {2: 100}, {2: -5}, {2: 60, 3: 40}, dict.fromkeys(range(2, 11), 1)]
)
def test_shares_that_make_no_sense_are_refused(registry: Registry, canaries: dict[int, int]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        split(registry, canaries)
    assert caught.value.param == "canaries"
    assert registry.get_adapter(T, "sql").aliases[1].revision == 1


def test_a_canary_is_a_ready_version(registry: Registry) -> None:
    publish(registry, "sql", "d" * 64, status="validating")
    for version, error in ((4, Conflict), (9, NotFound)):
        with pytest.raises(error):
            split(registry, {version: 10})


def test_a_canary_can_not_be_deleted_under_its_requests(registry: Registry) -> None:
    split(registry, {2: 10})
    with pytest.raises(Conflict, match="prod"):
        registry.delete_version(T, "sql", 2)
    split(registry, {})
    assert registry.delete_version(T, "sql", 2).version == 2


def test_a_compare_and_swap_of_shares_has_one_winner(registry: Registry) -> None:
    barrier = threading.Barrier(6)

    def attempt(percent: int) -> int | None:
        barrier.wait()
        try:
            registry.set_alias(T, "sql", "prod", 1, canaries={2: percent}, expected_revision=1)
        except Conflict:
            return None
        return percent

    with ThreadPoolExecutor(6) as pool:
        won = [percent for percent in pool.map(attempt, range(10, 70, 10)) if percent is not None]
    assert len(won) == 1
    assert registry.get_adapter(T, "sql").aliases[1].canaries == {2: won[0]}


class TestRollback:
    def back(self, registry: Registry, expected: int | None = None) -> int:
        return registry.roll_back_alias(T, "sql", "prod", expected_revision=expected).version

    def test_ends_a_canary_first(self, registry: Registry) -> None:
        split(registry, {2: 10})
        split(registry, {2: 50})
        assert self.back(registry) == 1
        assert registry.get_adapter(T, "sql").aliases[1].weights == {1: 100}
        with pytest.raises(Conflict, match="no earlier version"):
            self.back(registry)

    def test_after_a_promotion_returns_to_the_version_before(self, registry: Registry) -> None:
        split(registry, {2: 10})
        split(registry, {}, version=2)
        assert self.back(registry) == 1

    def test_repeated_goes_further_back_and_not_to_and_fro(self, registry: Registry) -> None:
        for version in (3, 2):
            split(registry, {}, version=version)
        assert [self.back(registry), self.back(registry)] == [3, 1]
        with pytest.raises(Conflict, match="no earlier version"):
            self.back(registry)
        split(registry, {}, version=2)
        assert self.back(registry) == 1

    def test_passes_over_what_was_deleted(self, registry: Registry) -> None:
        for version in (2, 3):
            split(registry, {}, version=version)
        registry.delete_version(T, "sql", 2)
        assert self.back(registry) == 1

    def test_is_a_compare_and_swap(self, registry: Registry) -> None:
        revision = split(registry, {}, version=2)
        with pytest.raises(Conflict, match="expected revision"):
            self.back(registry, revision - 1)
        assert self.back(registry, revision) == 1

    def test_needs_the_alias(self, registry: Registry) -> None:
        with pytest.raises(NotFound):
            registry.roll_back_alias(T, "sql", "beta", expected_revision=None)
        with pytest.raises(NotFound):
            registry.roll_back_alias(T, "other", "prod", expected_revision=None)
        with pytest.raises(InvalidReference):
            registry.roll_back_alias(T, "s\0l", "prod", expected_revision=None)

    def test_is_kept_as_history_with_every_other_move(self, registry: Registry) -> None:
        split(registry, {2: 10})
        self.back(registry)
        moves = registry.alias_history(T, "sql", "prod")
        assert [(move.revision, move.version, move.canaries) for move in moves] == [
            (3, 1, {}),
            (2, 1, {2: 10}),
            (1, 1, {}),
        ]
        with pytest.raises(NotFound):
            registry.alias_history(T, "sql", "beta")


def test_an_alias_of_before_the_history_was_kept_rolls_back_from_its_next_move(
    make_url: Callable[[], str],
) -> None:
    url = make_url()
    with Registry(url) as registry:
        for digit in "ab":
            publish(registry, "sql", digit * 64)
        registry.set_alias(T, "sql", "prod", 1, expected_revision=0)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as tx:  # as the release before left it
        tx.execute(text("DROP TABLE places"))
        tx.execute(text("DROP INDEX ix_usage_hour"))
        tx.execute(text("DROP TABLE alias_history"))
        tx.execute(text("ALTER TABLE aliases DROP COLUMN canaries"))
        tx.execute(text("DROP TABLE signers"))
        tx.execute(text("ALTER TABLE tenants DROP COLUMN signatures_required_at"))
        tx.execute(text("UPDATE alembic_version SET version_num = '0006'"))
    engine.dispose()
    with Registry(url) as registry:
        registry.set_alias(T, "sql", "prod", 2, expected_revision=1)
        assert registry.roll_back_alias(T, "sql", "prod", expected_revision=2).version == 1
