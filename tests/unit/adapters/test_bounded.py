"""Long JSON is parsed in a child first: what is too dear never reaches this process's parser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import PayloadTooLarge, Unavailable
from adapters.formats import bounded
from adapters.formats.bounded import SMALL_BYTES, check_bounds
from adapters.formats.files import MAX_HEADER_BYTES

NAME = "adapter_model.safetensors"


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def entries(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [1, 1, 1, 1], "data_offsets": [0, 4]}
    text = json.dumps({f"base_model.model.layers.{i}.weight": entry for i in range(count)}).encode()
    assert SMALL_BYTES < len(text) <= MAX_HEADER_BYTES
    return text


LISTS = b'{"a":[' + b",".join([b"[]"] * 340_000) + b"]}"


@pytest.mark.parametrize(
    "text",
    [
        entries(9000),
        b"{" + b" " * SMALL_BYTES + b"}",
        b"[" * 500_000 + b"]" * 500_000,
        b'{"a": ' + b"1" * 500_000 + b"}",
        b"\xff" * 500_000,
        json.dumps({"__metadata__": {"a": "b" * 900_000}}).encode(),
    ],
    ids=["as many tensors as fit", "space", "deep", "a long number", "not UTF-8", "metadata"],
)
def test_what_the_readers_can_judge_passes(text: bytes) -> None:
    check_bounds({NAME: safetensors(text), "manifest.json": text, "README.md": text})


@pytest.mark.parametrize("files", [{NAME: safetensors(LISTS)}, {"manifest.json": LISTS}])
def test_more_values_than_entries_have_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(PayloadTooLarge, match="340002 JSON values in 1 entries, at most") as caught:
        check_bounds(files)
    assert caught.value.remedy
    assert caught.value.param in files


@pytest.mark.parametrize(
    "dies",
    ["import os; os.kill(os.getpid(), 9)", "raise MemoryError"],
    ids=["killed", "out of memory"],
)
def test_a_child_that_dies_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dies: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(dies)
    monkeypatch.setattr(bounded, "_CHILD", child)
    with pytest.raises(PayloadTooLarge, match=f"'{NAME}': can't be parsed within"):
        check_bounds({NAME: safetensors(LISTS)})


@pytest.mark.parametrize(
    ("burns", "memory_mib", "cpu_s"),
    [("while True: pass", 512, 1), ("bytearray(1 << 30)", 512, 5)],
    ids=["time", "memory"],
)
def test_the_child_limits_itself(burns: str, memory_mib: int, cpu_s: int) -> None:
    child = f"import runpy; runpy.run_path({str(bounded._CHILD)!r})['main']()"
    program = f"{child}\n{burns}\nprint('survived')"
    command = [sys.executable, "-I", "-S", "-c", program, str(memory_mib << 20), str(cpu_s)]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=60, check=False)
    assert done.returncode != 0
    assert b"survived" not in done.stdout


@pytest.mark.parametrize("error", [OSError("no more processes"), subprocess.TimeoutExpired("x", 1)])
def test_no_child_is_no_fault_of_the_upload(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Unavailable, match="can't be checked now"):
        check_bounds({NAME: safetensors(entries(5000))})
    check_bounds({NAME: safetensors(b"{}"), "adapter_config.json": b"{}"})  # no child is needed


def test_a_length_that_lies_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    check_bounds({NAME: b"", "other.safetensors": (1 << 20).to_bytes(8, "little") + b"{}"})
