"""Compiling the CPU kernels with the machine's own C++ compiler, once per source, compiler and processor.

A plain C interface, called through ctypes: no binding to a torch version, and two seconds instead of a minute to build.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("cpu_rows.cpp", "cpu_attention.cpp")
HEADERS = ("cpu_types.h",)
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_S = 120.0


class KernelBuildError(Exception):
    """The CPU kernels can't be had on this machine; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels, built on first use and kept in the user's cache directory.

    torch must be imported before: the library shares its OpenMP runtime, hence its threads. Raises KernelBuildError.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise KernelBuildError(f"no C++ compiler ({', '.join(COMPILERS)}) is installed")
    version = subprocess.run(  # noqa: S603 - the compiler of this machine
        [compiler, "--version"], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    ).stdout
    texts = [(HERE / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, version, _processor()]).encode()).hexdigest()
    built = _cache_directory() / f"kernels-{key[:16]}.so"
    if not built.exists():
        _compile(compiler, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise KernelBuildError(f"the compiled kernels can't be loaded: {error}") from error


def _compile(compiler: str, target: Path) -> None:
    """Build into a temporary file and rename it: several processes may start at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        built = Path(directory) / target.name
        try:
            done = subprocess.run(  # noqa: S603 - the compiler of this machine on a file of this package
                [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(built)],
                capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelBuildError(f"{compiler} did not finish: {error}") from error
        if done.returncode != 0:
            raise KernelBuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        built.rename(target)


def _cache_directory() -> Path:
    """A directory of this user alone: what lies there is loaded into the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "deltamux"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if directory.stat().st_uid != os.getuid() or not os.access(directory, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="deltamux-"))
    except OSError:  # a read-only home: build anew in this process's own place
        return Path(tempfile.mkdtemp(prefix="deltamux-"))
    return directory


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
