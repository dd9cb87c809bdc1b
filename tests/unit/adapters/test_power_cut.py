"""A power cut at any moment: an acknowledged blob is there, any other whole or absent."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.store import Blob, LocalBlobStore
from tests.crash.power import Disk

REPOSITORY = Path(__file__).parents[3]
DIGESTS = [f"{first:02x}" + f"{number:062x}" for first in (0xAB, 0xCD) for number in range(2)]


def content(digest: str) -> Blob:
    return Blob(b"m" * 50, digest.encode() * 20)


class Cuts:
    """Cuts the power before and after each fsync, in several ways, and looks at what is left."""

    def __init__(self, directory: Path, ignored: Callable[[str], bool] = lambda path: False) -> None:
        self.root, self._scratch = directory / "blobs", directory / "after"
        self.root.mkdir()
        self.disk, self._ignored = Disk(self.root), ignored
        self.acknowledged: set[str] = set()
        self.num_cuts = 0

    def fsync(self, fd: int) -> None:
        self.cut()
        if not self._ignored(os.readlink(f"/proc/self/fd/{fd}")):
            self.disk.fsync(fd)
        self.cut()

    def cut(self) -> None:
        if (self.root / "sha256").exists():
            chance = random.Random(self.num_cuts)
            for keeps in (lambda: False, lambda: True, lambda: chance.random() < 0.5):
                self.disk.survive(self._scratch, keeps)
                self._look()
                shutil.rmtree(self._scratch)
                self.num_cuts += 1

    def _look(self) -> None:
        store = LocalBlobStore(self._scratch, fsync=lambda fd: None)
        left = set(store.iter_digests())
        assert self.acknowledged <= left, "an acknowledged blob is lost"
        for digest in left:
            assert store.read(digest) == content(digest)


@pytest.fixture
def cuts(tmp_path: Path) -> Iterator[Cuts]:
    made = Cuts(tmp_path)
    yield made
    made.disk.close()


def live(cuts: Cuts) -> None:
    """Blobs come, go and come again; one is taken over from a staging directory."""
    store = LocalBlobStore(cuts.root, fsync=cuts.fsync)
    for digest in (*DIGESTS, *DIGESTS[:1]):
        with store.staging() as staging:
            staged = staging / "upload"
            staged.write_bytes(content(digest).tensors)
            store.put(
                digest, content(digest).manifest, staged if digest == DIGESTS[1] else staged.read_bytes()
            )
        cuts.acknowledged.add(digest)
        cuts.cut()
    for digest in DIGESTS[1:3]:
        cuts.acknowledged.discard(digest)
        store.delete(digest)
        cuts.cut()
        store.put(digest, content(digest).manifest, content(digest).tensors)
        cuts.acknowledged.add(digest)
        cuts.cut()


def test_nothing_acknowledged_is_lost_and_nothing_is_half_there(cuts: Cuts) -> None:
    live(cuts)
    assert cuts.num_cuts > 200


@pytest.mark.parametrize(
    "unsynced",
    [
        r"manifest\.json$",
        r"tensors\.safetensors$",
        r"sizes\.json$",
        r"/blob$",
        r"/sha256/[0-9a-f]{2}$",
        r"/sha256$",
    ],
)
def test_each_fsync_is_needed(tmp_path: Path, unsynced: str) -> None:
    cuts = Cuts(tmp_path, ignored=lambda path: re.search(unsynced, path) is not None)
    try:
        with pytest.raises(Exception, match=r"lost|damaged"):
            live(cuts)
    finally:
        cuts.disk.close()


UPLOAD = """
import sys
from pathlib import Path
from adapters.registry import Registry
from adapters.store import LocalBlobStore

digest = "ab" + "0" * 62
store, registry = LocalBlobStore(Path(sys.argv[1]) / "blobs"), Registry(f"sqlite:///{sys.argv[1]}/registry.db")
hold = registry.blobs.hold(digest, 60)
store.put(digest, b"m", b"t")
registry.publish("default", "sql", digest, method="LORA", backbone_digest="", task="causal-lm", size_bytes=1,
                 labels={}, proof={}, hold=hold)
print("acknowledged", flush=True)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_bytes_are_synced_before_the_row_and_the_row_before_the_answer(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    traced = "trace=fsync,fdatasync,write,pwrite64,rename"
    command = ["strace", "-f", "-y", "-s", "16", "-o", str(log), "-e", traced]
    done = subprocess.run(
        [*command, sys.executable, "-c", UPLOAD, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    if done.returncode and "PTRACE" in done.stderr:
        pytest.skip("this machine forbids tracing")
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()

    def last(pattern: str, before: int) -> int:
        return max(i for i, call in enumerate(calls[:before]) if re.search(pattern, call))

    answered = last(r'write\(1<.*"acknowledged', len(calls))
    committed = last(r"f(data)?sync\(\d+<.*/registry\.db-wal>\) += 0", answered)
    logged = last(r"pwrite64\(\d+<.*/registry\.db-wal>", answered)
    visible = last(r"fsync\(\d+<.*/blobs/sha256/ab>\) += 0", answered)
    renamed = last(r'rename\("[^"]*', answered)
    synced = last(r"fsync\(\d+<.*/blobs/staging/[^/]+/blob>\) += 0", answered)
    began = max(i for i, call in enumerate(calls[:committed]) if re.search(r"f(data)?sync\(.*db-wal", call))
    assert synced < renamed < visible < logged < committed < answered
    assert began < visible, "the commit before is the hold's, and it comes before the bytes"
