"""The HTTP client against a stand-in server, what it may import, and the page made of result files."""

from __future__ import annotations

import ast
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import compare, http
from loadtest.page import render

ROOT = Path(__file__).parents[3]


class StandIn:
    """Streams `max_tokens` pieces like an OpenAI-compatible server; `short` of them are missing."""

    def __init__(self, *, usage: bool = True, short: int = 0) -> None:
        self.usage, self.short = usage, short
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            listed = ("lora10", "base", "lora1", "other", "lora2")
            return httpx.Response(200, json={"data": [{"id": name} for name in listed]})
        body = json.loads(request.content)
        self.bodies.append(body)
        self.authorization = request.headers.get("authorization")
        if body["model"] == "missing":
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        made = body["max_tokens"] - self.short
        chunks: list[Any] = [{"choices": [{"index": 0, "text": "x"}]} for _ in range(made)]
        if self.usage:
            chunks.append({"choices": [], "usage": {"completion_tokens": made}})
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


def run(server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *argv: str) -> dict[str, Any]:
    real = httpx.AsyncClient
    monkeypatch.setattr(
        http.httpx, "AsyncClient", lambda **kw: real(transport=httpx.MockTransport(server), **kw)
    )
    path = tmp_path / "result.json"
    http.main(
        ["--url", "http://stand-in", "--rounds", "2", "--output-tokens", "3", "--json", str(path), *argv]
    )
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.parametrize("usage", [True, False], ids=["usage object", "pieces counted"])
def test_every_case_at_every_concurrency(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usage: bool
) -> None:
    server = StandIn(usage=usage)
    monkeypatch.setenv("SOME_KEY", "secret")
    result = run(
        server, monkeypatch, tmp_path, "--model", "base", "--model", "a", "b", "--concurrency", "1", "2",
        "--api-key-env", "SOME_KEY", "--extra", '{"seed": 1}',
    )  # fmt: skip
    assert [record["label"] for record in result["records"]] == [
        "1 in flight, base", "1 in flight, a and 1 more", "2 in flight, base", "2 in flight, a and 1 more",
    ]  # fmt: skip
    assert set(result["records"][0]["values"]) == {
        "tok/s", "against first", "TTFT p50 ms", "TTFT p99 ms", "gap p50 ms", "gap p99 ms",
    }  # fmt: skip
    assert server.authorization == "Bearer secret"
    assert "secret" not in json.dumps(result)
    assert {body["model"] for body in server.bodies} == {"base", "a", "b"}
    assert all(
        body["seed"] == 1 and body["temperature"] == 0 and body["ignore_eos"] for body in server.bodies
    )
    assert all(isinstance(token, int) for token in server.bodies[0]["prompt"])


def test_cases_by_number_of_deltas_take_the_names_that_the_server_lists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = StandIn()
    result = run(
        server, monkeypatch, tmp_path, "--model", "base", "--deltas", "0", "2", "3", "--pattern", "lora*",
        "--concurrency", "1", "--server", "some", "--rounds", "1",
    )  # fmt: skip
    assert [(r["label"], r["facts"]) for r in result["records"]] == [
        (f"1 in flight, {count} deltas", {"server": "some"}) for count in (0, 2, 3)
    ]
    asked = [body["model"] for body in server.bodies]
    first, second = asked[:9], asked[9:]
    assert first[:3] == second[:3] == ["base"] * 3
    assert (first[3:6], second[3:6]) == (["lora1", "lora2", "lora1"], ["lora2", "lora1", "lora2"])
    assert first[6:] == ["lora1", "lora2", "lora10"]
    assert result["title"].startswith("some, outputs of 3")


def test_too_few_listed_deltas_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"3 models match 'lora\*', 4 are asked for"):
        run(StandIn(), monkeypatch, tmp_path, "--model", "base", "--deltas", "4", "--pattern", "lora*")


def test_a_model_s_own_fields_go_into_its_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = StandIn()
    bodies = tmp_path / "bodies.json"
    bodies.write_text(
        json.dumps({"base": {"lora": []}, "x0": {"lora": [{"id": 0}]}, "x1": {"lora": [{"id": 1}]}})
    )
    run(
        server, monkeypatch, tmp_path, "--model", "base", "--deltas", "0", "2", "--pattern", "x*",
        "--concurrency", "1", "--bodies", str(bodies),
    )  # fmt: skip
    assert {(body["model"], json.dumps(body["lora"])) for body in server.bodies} == {
        ("base", "[]"), ("x0", '[{"id": 0}]'), ("x1", '[{"id": 1}]'),
    }  # fmt: skip


def saved(
    path: Path, server: str | None, speeds: dict[str, tuple[float, float, float]], cpu: str = "some"
) -> str:
    """A result file of `http` with these medians, minima and maxima of tokens/s by case."""
    records = [
        {
            "label": label,
            "values": {"tok/s": dict(zip(("median", "low", "high"), speed, strict=True))},
            "facts": {"server": server} if server else {},
        }
        for label, speed in speeds.items()
    ]
    environment = {"cpu": cpu, "cores": 2, "gpu": None, "command": "python -m loadtest http"}
    path.write_text(json.dumps({"title": "t", "environment": environment, "records": records}))
    return str(path)


def test_servers_stand_side_by_side_with_ratios_to_the_first(tmp_path: Path) -> None:
    ours = saved(tmp_path / "a.json", "ours", {"1 delta": (6, 4, 8), "8 deltas": (5, 5, 5)})
    other = saved(tmp_path / "other.json", None, {"1 delta": (3, 2, 4)})
    out = tmp_path / "out.json"
    compare.main([ours, other, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["title"] == "side by side: ours, other"
    both, alone = result["records"]
    assert both["values"]["ours / other tok/s"] == {"median": 2, "low": 1, "high": 4}
    assert set(both["values"]) == {"ours tok/s", "other tok/s", "ours / other tok/s"}
    assert set(alone["values"]) == {"ours tok/s"}
    assert "ours / other tok/s" in render([out])


def test_results_of_two_machines_or_of_one_server_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = saved(tmp_path / "a.json", "ours", {"1 delta": (6, 4, 8)})
    elsewhere = saved(tmp_path / "b.json", "other", {"1 delta": (3, 2, 4)}, cpu="another")
    for second, reason in ((elsewhere, "different machines"), (ours, "same server's name")):
        with pytest.raises(SystemExit, match=r"^2$"):
            compare.main([ours, second])
        assert reason in capsys.readouterr().err


def test_a_short_reply_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 tokens in 2 pieces, asked for 3"):
        run(StandIn(short=1), monkeypatch, tmp_path, "--model", "base", "--concurrency", "1")


def test_an_error_reply_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"404: .*no such model"):
        run(StandIn(), monkeypatch, tmp_path, "--model", "missing", "--concurrency", "1")


def test_words_are_sent_where_ids_are_not_taken() -> None:
    server = StandIn()

    async def batch() -> None:
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(server), base_url="http://stand-in"
        ) as client:
            args = http.argparse.Namespace(text=True, output_tokens=2, per_place=3, extra={}, bodies={})
            await http.run_batch(client, ["base"], 1, args)

    asyncio.run(batch())
    assert all(body["prompt"].startswith("w") for body in server.bodies)


def test_the_http_client_imports_neither_package() -> None:
    todo, seen = ["http"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((ROOT / "loadtest" / f"{name}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"serving", "adapters"}, name
            todo += [
                n.split(".")[1] for n in names if n.startswith("loadtest.") and n.split(".")[1] not in seen
            ]
    assert seen == {"http", "report", "workload"}


def test_the_page_holds_tables_plots_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    result = {
        "title": "a <b>title",
        "environment": {"cpu": "some", "command": "python -m loadtest x", "gpu": None},
        "records": [
            {"label": "one", "values": {"tok/s": spread, "alone": spread}, "facts": {"budget": ">= 1"}},
            {"label": "two", "values": {"tok/s": spread}, "facts": {}},
        ],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(result))
    page = render([path])
    assert "a &lt;b&gt;title" in page
    assert "2 (1-3)" in page
    assert page.count("data:image/png;base64,") == 1  # the figure that only one case has gets none
    assert "http://" not in page
    assert "https://" not in page
