"""The conformance suite in short: it holds, it reaches every operation, and it sees what a server could get wrong."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.registry import Registry
from serving.http import errors
from tests.conformance import __main__ as conformance


def test_no_call_breaks_the_server_or_its_description() -> None:
    tally = conformance.run(2000)
    assert tally.calls.total() >= 2000
    assert all(tally.calls[phase] for phase in conformance.PHASES)
    assert max(tally.statuses) < 500
    assert tally.accepted >= {
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "PUT /v1/adapters/{name}/versions",
        "PUT /v1/adapters/{name}/aliases/{alias}",
        "DELETE /v1/adapters/{name}",
        "POST /v1/adapters/{name}/versions/{version}/undelete",
        "POST /v1/admin/keys/{key_id}/rotate",
        "GET /v1/usage",
    }


def crash(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("target", "name", "wrong", "says"),
    [
        (Registry, "list_versions", crash, "not_a_server_error.*GET /v1/adapters/{name}/versions"),
        (errors, "_envelope", lambda message, *_: {"message": message}, "response_schema_conformance"),
    ],
    ids=["a 500", "an error without its envelope"],
)
def test_the_suite_sees_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, wrong: Any, says: str
) -> None:
    monkeypatch.setattr(target, name, wrong)
    with pytest.raises(conformance.Broken, match=says):
        conformance.run(100, phases=("examples",))
