"""Which executors a replica gets, and what it says where it can't have the compiled ones."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest
import torch

from adapters.errors import BackboneRefused
from serving.kernels.cpu import CpuRows
from serving.kernels.select import select_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("serving.kernels.triton_rows", "serving.kernels.triton_kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_auto_takes_the_compiled_kernels_on_the_cpu_and_reference_none() -> None:
    assert isinstance(select_kernels("auto", CPU, torch.float32).fused, CpuRows)
    assert select_kernels("reference", CPU, torch.float32).fused is None


@pytest.mark.usefixtures("no_triton")
def test_cuda_without_triton_runs_plain_torch_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert select_kernels("auto", CUDA, torch.bfloat16).fused is None
    assert "plain torch: triton can't be imported" in caplog.text
    with pytest.raises(BackboneRefused, match="triton can't be imported"):
        select_kernels("compiled", CUDA, torch.bfloat16)


@pytest.mark.parametrize("device", [CPU, torch.device("meta")], ids=str)
def test_another_dtype_or_device_is_named(device: torch.device) -> None:
    with pytest.raises(BackboneRefused, match=f"torch.float64 on {device.type}"):
        select_kernels("compiled", device, torch.float64)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs deltamux[cuda]")
def test_cuda_with_triton_takes_its_kernels() -> None:
    kernels = select_kernels("compiled", CUDA, torch.bfloat16)
    assert type(kernels.fused).__name__ == "TritonRows"
    assert kernels.decode is None
