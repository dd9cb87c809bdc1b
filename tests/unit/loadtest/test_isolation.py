"""The isolation soak: nothing wrong on a server that is right; and that it sees each thing that must not be."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import ErrorInfo
from loadtest import churn, server
from loadtest.estate import ABSENT, Adapter, Question, Timeline
from loadtest.isolation import main
from serving.core import Event, FailureEvent, GenerateCall
from serving.engine.backend import LocalBackend
from serving.tenancy.grants import Grants

SHORT = (
    "--server", "local", "--tokens", "700", "--tenants", "3", "--deltas", "24", "--room", "3", "--in-flight", "9",
    "--output-tokens", "24",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _eventful(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(churn, "CHANGE_EVERY_S", 0.02)
    monkeypatch.setattr(churn, "SHARED", 0.8)
    monkeypatch.setattr(churn, "BARE_PROMPTS", 2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def facts_of(tmp_path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())["records"][0]["facts"]
    return facts


def run(tmp_path: Path) -> None:
    main([*SHORT, "--json", str(tmp_path / "result.json")])


def fails(tmp_path: Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 1
    return facts_of(tmp_path)


class Planted(LocalBackend):
    """A backend that does something else to the twentieth request for a delta; `done` says that it did."""

    done = False
    last = ""

    async def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        if call.adapter_digest is not None and not Planted.done and call.adapter_digest != Planted.last:
            Planted.last, before = call.adapter_digest, Planted.last
            if before:
                Planted.done = True
                async for batch in self.plant(call, before):
                    yield batch
                return
        async for batch in super().generate(call):
            yield batch

    def plant(self, call: GenerateCall, other: str) -> AsyncGenerator[tuple[Event, ...], None]:
        raise NotImplementedError

    def with_digest(self, call: GenerateCall, digest: str | None) -> AsyncGenerator[tuple[Event, ...], None]:
        changed = {name: getattr(call, name) for name in call.__dataclass_fields__} | {
            "adapter_digest": digest
        }
        return super().generate(GenerateCall(**changed))


class Swaps(Planted):
    def plant(self, call: GenerateCall, other: str) -> AsyncGenerator[tuple[Event, ...], None]:
        return self.with_digest(call, other)


class Forgets(Planted):
    def plant(self, call: GenerateCall, other: str) -> AsyncGenerator[tuple[Event, ...], None]:
        return self.with_digest(call, None)


class Breaks(Planted):
    async def plant(self, call: GenerateCall, other: str) -> AsyncGenerator[tuple[Event, ...], None]:
        yield (FailureEvent(error=ErrorInfo("Unavailable", "No replica.")),)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(backend: type[Planted]) -> None:
        monkeypatch.setattr(Planted, "done", False)
        monkeypatch.setattr(Planted, "last", "")
        monkeypatch.setattr(server, "LocalBackend", backend)

    return use


def test_tenants_stay_apart_while_everything_changes(tmp_path: Path) -> None:
    run(tmp_path)
    facts = facts_of(tmp_path)
    assert (facts["foreign"], facts["base"], facts["bare and wrong"], facts["problems"]) == (0, 0, 0, 0)
    assert facts["tokens"] >= 700
    for seen in ("evictions", "ended: denied", "ended: complete", "requests, granted", "requests, bare"):
        assert facts[seen] > 0, seen
    for change in ("alias moves", "uploads", "grants"):
        assert facts[change] > 0, change


def test_another_delta_s_tokens_are_seen(
    tmp_path: Path, plant: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(Swaps)
    facts = fails(tmp_path)
    assert facts["foreign"] > 0
    assert facts["base"] == facts["bare and wrong"] == 0
    assert "wrong tokens" in capsys.readouterr().err


def test_the_backbone_s_tokens_in_a_delta_s_place_are_seen(tmp_path: Path, plant: Any) -> None:
    plant(Forgets)
    facts = fails(tmp_path)
    assert facts["base"] > 0
    assert facts["foreign"] == 0


def test_an_error_without_a_kill_is_seen(
    tmp_path: Path, plant: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(Breaks)
    facts = fails(tmp_path)
    assert facts["problems"] == facts["ended: broken before its first token"] == 1
    assert "503 unavailable without a kill" in capsys.readouterr().err


def test_a_private_delta_that_another_tenant_sees_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Grants, "covers", lambda *_: True)
    facts = fails(tmp_path)
    assert facts["problems"] > 0
    assert "not among the allowed" in capsys.readouterr().err


def test_a_change_holds_at_some_moment_between_its_sending_and_its_acknowledgement() -> None:
    line = Timeline("a")
    line.send("b", 10.0)
    assert line.during(0.0, 9.0) == {"a"}
    assert line.during(0.0, 11.0) == line.during(12.0, 13.0) == {"a", "b"}
    line.acknowledge(20.0)
    assert line.during(0.0, 9.0) == {"a"}
    assert line.during(15.0, 16.0) == {"a", "b"}
    assert line.during(21.0, 22.0) == {"b"}
    line.send("c", 30.0)
    line.refuse()
    assert line.during(31.0, 32.0) == {"b"}


def test_a_grant_that_ended_before_a_request_allows_nothing_and_one_that_ends_meanwhile_allows_both() -> None:
    grant = Timeline(True)
    adapter = Adapter("owner", "d", ["v1"], Timeline("v1"), grants={"friend": grant})
    grant.send(False, 10.0)
    grant.acknowledge(20.0)

    def asked_by(tenant: str) -> Question:
        return Question("", tenant, "owner/d", adapter, None, False, (1,), 1, False, False)

    assert asked_by("friend").allowed(0.0, 5.0) == {"v1"}
    assert asked_by("friend").allowed(0.0, 15.0) == {"v1", ABSENT}
    assert asked_by("friend").allowed(25.0, 26.0) == {ABSENT}
    assert asked_by("stranger").allowed(0.0, 5.0) == {ABSENT}
    assert asked_by("owner").allowed(25.0, 26.0) == {"v1"}
