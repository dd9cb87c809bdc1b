"""The compiled kernels are built once, and a machine that can't build them serves in plain torch or says why not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapters.errors import BackboneRefused
from serving.kernels.cpu_build import KernelBuildError, load_library
from serving.kernels.select import select_kernels

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield tmp_path / "cache" / "deltamux"
    load_library.cache_clear()


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_build_is_kept_for_the_next_process(fresh_cache: Path) -> None:
    load_library()
    (built,) = fresh_cache.iterdir()
    before = built.stat()
    load_library.cache_clear()
    load_library()
    assert [path.stat().st_ino for path in fresh_cache.iterdir()] == [before.st_ino]
    assert fresh_cache.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_is_plain_torch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kernels = select_kernels("auto", CPU, torch.float32)
    assert (kernels.fused, kernels.decode) == (None, None)
    assert "no C++ compiler" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_compiled_is_refused() -> None:
    with pytest.raises(BackboneRefused, match=r"no C\+\+ compiler"):
        select_kernels("compiled", CPU, torch.float32)


def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(KernelBuildError, match="no such flag"):
        load_library()
    assert list(fresh_cache.iterdir()) == []


def test_a_dtype_that_they_do_not_know_is_left_to_torch() -> None:
    assert select_kernels("auto", CPU, torch.float16).fused is None
    assert select_kernels("reference", CPU, torch.float32).fused is None
    compiled = select_kernels("compiled", CPU, torch.bfloat16)
    assert compiled.fused is not None
    assert compiled.decode is not None
