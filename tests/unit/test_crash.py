"""The crash suite in short: it holds, and it sees where the order of an upload is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres import find_binaries

REPOSITORY = Path(__file__).parents[2]
NEEDS_POSTGRESQL = pytest.mark.skipif(
    find_binaries() is None, reason="PostgreSQL is not installed (apt-get install postgresql)"
)

ROW_BEFORE_BYTES = """
import tests.crash.worker as worker
from tests.crash.__main__ import main

def upload(registry, store, tenant, name, content, alias):
    hold = registry.blobs.hold(content.digest, 60)
    registry.publish(tenant, name, content.digest, method="LORA", backbone_digest="", task="causal-lm",
                     size_bytes=1, labels={}, proof={}, alias=alias, hold=hold)
    store.put(content.digest, content.manifest, content.tensors)

worker._upload = upload
main(["--kills", "100"])
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="sqlite"),
        pytest.param(("--http",), id="http"),
        pytest.param(("--database", "postgresql"), marks=NEEDS_POSTGRESQL, id="postgresql"),
    ],
)
def test_kill_9_loses_nothing(options: tuple[str, ...]) -> None:
    kills = 10 if options else 30
    done = python("-m", "tests.crash", "--kills", str(kills), *options)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+) kills at", done.stdout)[1]) >= kills  # type: ignore[index]
    assert "0 lost, 0 half-visible; 0 orphans" in done.stdout


def test_the_suite_sees_a_row_that_comes_before_its_bytes() -> None:
    done = python("-c", ROW_BEFORE_BYTES)
    assert done.returncode == 1
    assert "the bytes of an acknowledged upload are lost" in done.stderr
