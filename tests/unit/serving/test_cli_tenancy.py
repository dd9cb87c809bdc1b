"""`deltamux tenants|keys|audit` against a listening gateway and its database."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.cli import app
from tests.unit.serving.http_support import BACKBONE, Gateway, gateway, listening

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


async def run(*arguments: str) -> Any:
    """Run a command beside the event loop that the server needs."""
    return await asyncio.to_thread(RUNNER.invoke, app, list(arguments))


async def test_from_the_first_key_to_a_tenants_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAMUX_DATABASE__URL", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("DELTAMUX_AUTH__SECRET_FILE", str(tmp_path / "secret"))
    monkeypatch.chdir(tmp_path)
    async with gateway(tmp_path) as g, listening(g.app) as (host, port):
        await journey(g, f"http://{host}:{port}", monkeypatch, tmp_path)


async def journey(g: Gateway, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def ok(*arguments: str) -> str:
        result = await run(*arguments, *(("--server", url) if arguments[1] != "bootstrap" else ()))
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    first = (await ok("keys", "bootstrap")).strip()
    assert g.tenancy.caller(first).tenant == "default"
    refused = await run("tenants", "list", "--server", url)
    assert refused.exit_code == 1
    assert "DELTAMUX_API_KEY" in refused.output

    monkeypatch.setenv("DELTAMUX_API_KEY", first)
    assert "100" in await ok("tenants", "create", "acme", "--rpm", "100", "--class", "batch")
    shown = await ok("tenants", "limits", "acme", "--tpm", "7000", "--weight", "2")
    assert ("7000" in shown, "100" in shown, "standard" in shown) == (True, False, True)
    key = (await ok("keys", "create", "acme", "--scope", "infer", "--scope", "upload", "--days", "3")).strip()
    assert g.tenancy.caller(key).limits.tokens_per_min == 7000
    narrow = (await ok("keys", "create", "acme", "--adapter", "a-*", "--label", "bot")).strip()
    assert g.tenancy.caller(narrow).globs == ("a-*",)
    key_id = narrow.split("_")[1]
    second = (await ok("keys", "rotate", key_id, "--overlap", "0")).strip()
    await ok("keys", "revoke", second.split("_")[1])
    listed = await ok("keys", "list", "--tenant", "acme")
    assert ("bot" in listed, "revoked" in listed, second in listed) == (True, True, False)
    await g.openai.with_options(api_key=first).completions.create(model=BACKBONE, prompt=[1, 2, 3])
    g.tenancy.ledger.stop()
    for grouping in ("tenant", "key", "adapter", "hour", "outcome"):
        assert "1" in await ok("usage", "--by", grouping)
    assert "completed" in await ok("usage", "--by", "outcome", "--by", "hour", "--tenant", "default")
    assert "disabled" in await ok("tenants", "disable", "acme")
    assert "active" in await ok("tenants", "enable", "acme")

    log = (await run("audit", "list")).output
    assert all(action in log for action in ("key.create", "tenant.limits", "key.rotate", "cli"))
    assert first not in log
    good = await run("audit", "verify")
    assert (good.exit_code, "whole" in good.output) == (0, True)
    noted = good.output.split("head ")[1].split()[0]
    assert (await run("audit", "verify", "--head", noted)).exit_code == 0
    await ok("tenants", "disable", "acme")
    with sqlite3.connect(tmp_path / "registry.db") as raw:
        lines = raw.execute("SELECT count(*) FROM audit_log").fetchone()[0]
        raw.execute("DELETE FROM audit_log WHERE seq > ?", [lines - 2])
    short = await run("audit", "verify")
    assert (short.exit_code, f"ends at line {lines - 2}, but {lines} were" in short.output) == (1, True)
    with sqlite3.connect(
        tmp_path / "registry.db"
    ) as raw:  # with its head: what was noted outside still knows
        last = "SELECT hash FROM audit_log ORDER BY seq DESC LIMIT 1"
        raw.execute(f"UPDATE audit_head SET seq = ?, hash = ({last})", [lines - 2])  # noqa: S608
    assert (await run("audit", "verify")).exit_code == 0
    cut = await run("audit", "verify", "--head", noted)
    assert (cut.exit_code, "no line has the hash" in cut.output) == (1, True)
    with sqlite3.connect(tmp_path / "registry.db") as raw:
        raw.execute("UPDATE audit_log SET actor = 'nobody' WHERE action = 'key.revoke'")
    bad = await run("audit", "verify")
    assert (bad.exit_code, "broken" in bad.output) == (1, True)
