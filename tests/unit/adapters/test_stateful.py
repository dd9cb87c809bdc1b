"""The stateful suite in short, on both databases; and what its parts must be able to see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete

from adapters import deletion
from adapters.migrations.schema import alias_history, aliases
from adapters.registry import Registry
from tests.postgres import PostgresServer
from tests.stateful.__main__ import check_histories, check_model, databases
from tests.stateful.histories import Call, State, is_linearizable


def test_the_registry_does_what_its_model_does() -> None:
    with databases("sqlite") as make_url:
        check_model(make_url, 500)


def test_the_registry_on_postgresql_does_what_its_model_does(postgres: PostgresServer) -> None:
    check_model(lambda: postgres.clear("shared"), 250)


def test_the_model_sees_a_version_that_comes_back_under_its_old_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point = deletion.point

    def forgets_revisions(
        tx: Connection, adapter_id: int, alias: str, version: int | None, now: float
    ) -> object:
        if version is None:
            for kept in (aliases, alias_history):
                tx.execute(delete(kept).where(kept.c.adapter_id == adapter_id, kept.c.alias == alias))
            return 0, 0.0
        return point(tx, adapter_id, alias, version, now)

    monkeypatch.setattr(deletion, "point", forgets_revisions)
    with databases("sqlite") as make_url, pytest.raises(AssertionError):
        check_model(make_url, 5000, seed=0, shrink=False)


def test_concurrent_histories_are_linearizable(url: str) -> None:
    assert check_histories(url, 25) > 50


def swap(began: int, ended: int, expected: int, version: int, result: State | None) -> Call:
    return Call(began, ended, "swap", expected, version, result)


def read(began: int, ended: int, result: State) -> Call:
    return Call(began, ended, "read", 0, 0, result)


@pytest.mark.parametrize(
    ("history", "verdict"),
    [
        ([], True),
        ([swap(0, 1, 0, 5, (1, 5)), read(2, 3, (1, 5))], True),
        ([swap(0, 1, 0, 5, (1, 5)), read(2, 3, (0, 0))], False),  # a stale read
        ([swap(0, 9, 0, 5, (1, 5)), read(2, 3, (0, 0)), read(4, 5, (1, 5))], True),
        ([swap(0, 9, 0, 5, (1, 5)), read(2, 3, (1, 5)), read(4, 5, (0, 0))], False),  # time runs backwards
        ([swap(0, 9, 0, 5, (1, 5)), swap(0, 9, 0, 6, (1, 6))], False),  # both win
        ([swap(0, 9, 0, 5, (1, 5)), swap(0, 9, 0, 6, None)], True),
        ([swap(0, 9, 0, 5, None), swap(0, 9, 0, 6, None)], False),  # nobody wins
        ([swap(0, 9, 1, 5, None), swap(0, 9, 0, 6, (1, 6)), read(10, 11, (1, 6))], True),
    ],
)
def test_the_checker_knows_right_from_wrong(history: list[Call], verdict: bool) -> None:
    assert is_linearizable(history, (0, 0)) is verdict


def test_the_checker_sees_a_swap_without_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    honest: Callable[..., object] = Registry.set_alias

    def careless(self: Registry, *arguments: object, expected_revision: int | None) -> object:
        return honest(self, *arguments, expected_revision=None)

    monkeypatch.setattr(Registry, "set_alias", careless)
    with pytest.raises(AssertionError):
        check_histories(f"sqlite:///{tmp_path}/registry.db", 20)
