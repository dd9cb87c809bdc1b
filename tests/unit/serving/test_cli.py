"""The command line without a server behind it: help, refusals, what is sent, the demo's verdict, port listing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from adapters.errors import Conflict, DeltamuxError, InvalidDelta, InvalidRequest
from adapters.registry import Registry
from adapters.store import LocalBlobStore
from serving.cli import app, heldout
from serving.cli.client import body_of
from serving.cli.doctor import verdict
from serving.cli.push import files_to_send
from serving.cli.serve import load
from serving.cli.sockets import Listener, listeners
from serving.deployments.app import running
from serving.deployments.ports import reserved_port

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
COMMANDS = ("serve", "push", "adapters", "tenants", "keys", "signers", "usage", "audit", "demo", "doctor")


def run(*arguments: str) -> Any:
    return RUNNER.invoke(app, list(arguments))


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("adapters", "rollback")])
def test_help(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0, result.output


def test_the_command_starts_without_torch_ray_and_server_code() -> None:
    code = "import sys, serving.cli; print(sorted({m.split('.')[0] for m in sys.modules}), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not {"torch", "ray", "transformers", "fastapi", "sqlalchemy", "serving.config"} & loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve",), "backbone"),
        (("serve", "--backbone", "x", "--host", "0.0.0.0"), "--insecure"),  # noqa: S104
        (("serve", "--backbone", "/no/such/place"), "does not exist"),
        (("serve", "--backbone", "x", "--config", "/no/such/file"), "can't be read"),
        (("push", "/no/such/place", "name"), "not a directory"),
        (("adapters", "list", "--server", "http://127.0.0.1:9"), "deltamux serve"),
        (("adapters", "list", "--server", "ftp://x"), "does not answer"),
        (("demo", "--data", "/no/such/place"), "checkout"),
    ],
)
def test_refusals_say_what_and_remedy_without_a_traceback(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "error:" in result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_an_unknown_choice_is_a_usage_error() -> None:
    assert run("serve", "--backbone", "x", "--device", "tpu").exit_code == 2


def test_flags_win_and_absent_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("backbone: {path: from-file, dtype: float32}\nserver: {port: 1234}\n")
    monkeypatch.setenv("DELTAMUX_SERVER__PORT", "1235")
    settings = load({"backbone": {"path": "from-flag"}}, config)
    assert (settings.backbone.path, settings.backbone.dtype, settings.server.port) == (
        "from-flag",
        "float32",
        1235,
    )


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = load({"backbone": {"path": "x"}, "server": {"port": taken.getsockname()[1]}}, None)
        with pytest.raises(InvalidRequest, match="Address already in use"), running(settings, print):
            pass


def test_a_reserved_port_is_kept_from_others_and_open_to_serve() -> None:
    with reserved_port("127.0.0.1", 0) as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind(("127.0.0.1", port))


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"x")
    return directory


def test_only_a_deltas_own_files_are_sent(tmp_path: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    directory = touch(tmp_path, *names, "README.md", "training_args.bin", "optimizer.pt", "adapter_model.bin")
    assert tuple(files_to_send(directory)) == names


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("adapter_config.json",),
        ("adapter_config.json", "adapter_model.bin"),
        ("adapter_config.json", "adapter.safetensors", "head_config.json"),
        ("adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"),
    ],
)
def test_what_is_not_one_delta_is_not_sent(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidDelta):
        files_to_send(touch(tmp_path, *names))


def test_every_problem_of_a_refused_upload_is_printed(tmp_path: Path) -> None:
    result = run("push", str(touch(tmp_path, "adapter_config.json", "head_config.json")), "name")
    assert result.exit_code == 1
    assert "2 problems" in result.output
    assert "head_config.json" in result.output


@pytest.mark.parametrize(
    ("status", "content", "kind", "says"),
    [
        (400, {"error": {"message": "m", "param": "adapter", "problems": ["p", "q"]}}, InvalidDelta, "p"),
        (409, {"error": {"message": "moved", "param": None}}, DeltamuxError, "moved"),
        (502, {"detail": "x"}, DeltamuxError, "502"),
        (200, ["not", "an", "object"], DeltamuxError, "JSON"),
    ],
)
def test_answers_become_errors(status: int, content: Any, kind: type[DeltamuxError], says: str) -> None:
    with pytest.raises(kind, match=says):
        body_of(httpx.Response(status, json=content))


def test_the_demo_passes_only_with_equal_scores_and_a_backbone_that_can_not_do_the_task() -> None:
    data = {"method": "lora", "library": "l", "max_tokens": 4, "offline_correct": 3}
    prompts = [{"prompt": str(number), "expected": "yes", "reference": " yes"} for number in range(4)]
    (task,) = heldout.read_tasks({"deltas": {"d": {**data, "prompts": prompts}}})

    def score(served: str, bare: str) -> heldout.Score:
        results = [
            heldout.Result(task, model, prompt, f" {'yes' if letter == 'y' else 'no'}")
            for model, answers in (("d", served), (heldout.BASE, bare))
            for prompt, letter in zip(task.prompts, answers, strict=True)
        ]
        return heldout.scores([task], results)[0]

    assert score("yyyn", "ynnn").passes
    assert score("yyyn", "ynnn").num_identical == 3
    assert not score("yynn", "nnnn").is_equal
    assert not score("yyyy", "nnnn").is_equal  # better than offline is not the same delta either
    assert not score("yyyn", "yynn").passes


def test_open_ports_of_a_process_and_its_children() -> None:
    code = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1]); "
    code += "sys.stdout.flush(); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    port = int(child.stdout.readline())
    with socket.socket(socket.AF_INET6) as wide:
        wide.bind(("::", 0))
        wide.listen()
        found = {item.port: item for item in listeners(os.getpid())}
        assert found[wide.getsockname()[1]].address == "::"
    child.communicate(timeout=10)
    assert (found[port].address, found[port].pid, found[port].is_loopback) == ("127.0.0.1", child.pid, True)


@pytest.mark.parametrize(
    ("address", "port", "says"),
    [
        ("127.0.0.1", 8000, "as meant"),
        ("0.0.0.0", 8000, "open"),  # noqa: S104
        ("127.0.0.1", 9000, "as meant"),
        ("0.0.0.0", 9000, "open"),  # noqa: S104
        ("127.0.0.1", 4000, "closed"),
        ("::", 4000, "guarded"),
    ],
)
def test_verdicts(address: str, port: int, says: str) -> None:
    assert says in verdict(Listener(address, port, 1, "p"), "http://127.0.0.1:8000", "http://127.0.0.1:9000")


def test_conflict_prints_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Conflict("The alias moved.", param="expected_revision", remedy="Read it again.")

    monkeypatch.setattr("serving.cli.client.Client.call", refuse)
    result = run("adapters", "promote", "name", "3")
    assert result.exit_code == 1
    for line in ("error: The alias moved.", "where: expected_revision", "remedy: Read it again."):
        assert line in result.output


def test_demo_data_is_read_as_it_is_written(tmp_path: Path) -> None:
    entry = {
        "method": "m",
        "library": "l",
        "max_tokens": 1,
        "offline_correct": 0,
        "offline_accuracy": 0.0,
        "prompts": [],
    }
    tasks = heldout.read_tasks(json.loads(json.dumps({"deltas": {"a": entry, "b": entry}})))
    assert [task.delta for task in tasks] == ["a", "b"]


def test_gc_removes_what_was_deleted_long_enough_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, database = tmp_path / "blobs", f"sqlite:///{tmp_path}/registry.db"
    LocalBlobStore(store).put("a" * 64, b"m", b"t")
    where = ("adapters", "gc", "--store", str(store), "--database", database)
    assert "at least limits.request_timeout_s" in run(*where, "--grace-s", "1").output
    now = time.time()
    for passed_s, says in ((0, "0 removed, 1 newly"), (86_000, "0 removed, 0 newly"), (86_400, "1 removed")):
        monkeypatch.setattr(time, "time", lambda passed_s=passed_s: now + passed_s)
        monkeypatch.setattr(Registry.__init__, "__kwdefaults__", {"busy_timeout_s": 5.0, "clock": time.time})
        assert says in run(*where).output
    assert list(LocalBlobStore(store).iter_digests()) == []
