"""The Triton kernels without a GPU: the kernel contract under Triton's interpreter, and their compilation for sm_90.

Each needs a process of its own: the interpreter is chosen by the environment, before triton is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = ("test_kernels", "test_matrix_kernels", "test_fused_rows", "test_triton_rows")
CHOSEN = "triton and not two and (not test_low_rank_equals_its_formula or skewed or True-silu)"
"""Every activation on one shape, every shape with one activation: the interpreter takes 1000 times a device's time."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton: pip install 'deltamux[cuda]'"
)


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_contract_holds_under_the_interpreter() -> None:
    files = [f"tests/contract/{name}.py" for name in CONTRACT]
    out = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *files, TRITON_INTERPRET="1"
    )
    assert int(out.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1]) >= 40, out


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from serving.kernels import triton_kernels
from serving.kernels.triton_rows import COLUMN_TILE, K_TILE

KERNELS = {
    "shrink": {"K_TILE": K_TILE},
    "expand": {"SPLITS": 2, "TILE": COLUMN_TILE, "WITH_AFFINE": True},
    "affine": {"TILE": COLUMN_TILE},
    "turn": {"TILE": COLUMN_TILE},
}
for name, constants in KERNELS.items():
    kernel = getattr(triton_kernels, name)
    names = [parameter.name for parameter in kernel.params]
    types = {"plan": "*i64", "taps": "*i64", "hidden": "*fp32", "x": "*bf16", "y": "*bf16", "source": "*bf16"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert made.asm["cubin"]
    forbidden = re.search(r"\\b(atom|red)\\.|tf32", made.asm["ptx"])
    assert forbidden is None, (name, forbidden)
    print(name, "compiled")
"""


def test_the_kernels_compile_for_a_device_without_atomics_or_tf32(tmp_path: Path) -> None:
    out = run("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert out.count("compiled") == 4, out
