"""The local blob store: durable before acknowledged, whole or absent whatever interrupts it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import StoreError
from adapters.store import BlobStore, LocalBlobStore

REPOSITORY = Path(__file__).parents[3]
DIGEST = "ab" + "0123456789abcdef" * 3 + "0" * 14
OTHER = "cd" + DIGEST[2:]
MANIFEST, TENSORS = b'{"format":"deltamux/1"}', bytes(range(256)) * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "srv" / "blobs"


@pytest.fixture
def store(root: Path) -> LocalBlobStore:
    return LocalBlobStore(root)


def read(store: BlobStore, digest: str = DIGEST) -> tuple[bytes, bytes]:
    blob = store.read(digest)
    return blob.manifest, blob.tensors


def tensors_file(root: Path) -> Path:
    return root / "sha256" / "ab" / DIGEST / "tensors.safetensors"


def leftovers(root: Path) -> list[str]:
    """Every entry below the store that is not a whole blob."""
    blobs = {path for path in (root / "sha256").glob("*/*") if len(list(path.iterdir())) == 3}
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.parent not in blobs and path not in blobs and path.parent not in (root, root / "sha256")
    )


class TestContent:
    def test_stores_bytes(self, store: LocalBlobStore, root: Path) -> None:
        assert not store.exists(DIGEST)
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.exists(DIGEST)
        assert read(store) == (MANIFEST, TENSORS)
        assert tensors_file(root).read_bytes() == TENSORS
        assert leftovers(root) == []

    def test_takes_over_a_staged_file_without_a_copy(self, store: LocalBlobStore, root: Path) -> None:
        with store.staging() as staging:
            staged = staging / "upload"
            staged.write_bytes(TENSORS)
            inode = staged.stat().st_ino
            store.put(DIGEST, MANIFEST, staged)
        assert read(store) == (MANIFEST, TENSORS)
        assert tensors_file(root).stat().st_ino == inode
        assert leftovers(root) == []

    def test_the_same_again_changes_nothing(self, store: LocalBlobStore, root: Path) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        before = tensors_file(root).stat()
        store.put(DIGEST, MANIFEST, TENSORS)
        after = tensors_file(root).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_refuses_another_content_for_a_digest(self, store: LocalBlobStore) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        with pytest.raises(StoreError, match=f"{DIGEST} is stored with sizes"):
            store.put(DIGEST, MANIFEST, TENSORS + b"x")
        assert read(store) == (MANIFEST, TENSORS)

    def test_lists_digests_and_nothing_else(self, store: LocalBlobStore, root: Path) -> None:
        for digest in (DIGEST, OTHER):
            store.put(digest, MANIFEST, TENSORS)
        (root / "sha256" / "lost+found").mkdir()
        (root / "sha256" / "ab" / "notes.txt").touch()
        assert sorted(store.iter_digests()) == [DIGEST, OTHER]

    def test_deletes_whole_and_only_once(self, store: LocalBlobStore, root: Path) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        store.put(OTHER, MANIFEST, TENSORS)
        with tensors_file(root).open("rb") as reader:
            store.delete(DIGEST)
            assert reader.read() == TENSORS  # who reads it already keeps it
        store.delete(DIGEST)
        assert list(store.iter_digests()) == [OTHER]
        assert leftovers(root) == []


class TestDamage:
    def test_a_missing_blob(self, store: LocalBlobStore, root: Path) -> None:
        with pytest.raises(StoreError, match="is not in the store") as caught:
            store.read(DIGEST)
        assert str(root) not in str(caught.value)

    @pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors", "sizes.json"])
    @pytest.mark.parametrize("how", ["cut", "gone"])
    def test_a_file_that_lost_bytes(self, store: LocalBlobStore, root: Path, name: str, how: str) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        victim = root / "sha256" / "ab" / DIGEST / name
        if how == "cut":
            victim.write_bytes(victim.read_bytes()[:-1])
        else:
            victim.unlink()
        for attempt in (lambda: store.read(DIGEST), lambda: store.put(DIGEST, MANIFEST, TENSORS)):
            with pytest.raises(StoreError, match="is damaged") as caught:
                attempt()
            assert str(root) not in str(caught.value)
        store.delete(DIGEST)
        store.put(DIGEST, MANIFEST, TENSORS)
        assert read(store) == (MANIFEST, TENSORS)


class RecordingFsync:
    """Syncs, and notes what was synced and whether the blob was visible then. Fails at call `fail_at`."""

    def __init__(self, root: Path, fail_at: int | None = None, code: int = errno.ENOSPC) -> None:
        self.root, self.fail_at, self.code = root, fail_at, code
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        visible = (self.root / "sha256" / DIGEST[:2] / DIGEST).exists()
        self.calls.append((path, visible))
        if len(self.calls) == self.fail_at:
            raise OSError(self.code, os.strerror(self.code), path)
        os.fsync(fd)


class TestDurability:
    def test_syncs_content_before_and_directories_after_the_rename(self, root: Path) -> None:
        fsync = RecordingFsync(root)
        store = LocalBlobStore(root, fsync=fsync)
        made = {path for path, _ in fsync.calls}
        assert {str(root), str(root.parent), str(root.parent.parent)} <= made
        fsync.calls.clear()
        store.put(DIGEST, MANIFEST, TENSORS)
        before = [Path(path).name for path, visible in fsync.calls if not visible]
        after = [path for path, visible in fsync.calls if visible]
        assert before == ["manifest.json", "tensors.safetensors", "sizes.json", "blob"]
        assert after == [str(root / "sha256" / "ab"), str(root / "sha256")]

    def test_a_repeated_put_does_not_rely_on_the_first_one_to_sync(self, root: Path) -> None:
        fsync = RecordingFsync(root)
        store = LocalBlobStore(root, fsync=fsync)
        store.put(DIGEST, MANIFEST, TENSORS)
        fsync.calls.clear()
        store.put(DIGEST, MANIFEST, TENSORS)
        assert [path for path, _ in fsync.calls] == [str(root / "sha256" / "ab"), str(root / "sha256")]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    @pytest.mark.parametrize("step", range(1, 7))
    def test_a_failing_disk_leaves_nothing_half_visible(self, root: Path, step: int, code: int) -> None:
        LocalBlobStore(root)
        fsync = RecordingFsync(root)
        store = LocalBlobStore(root, fsync=fsync)
        fsync.calls.clear()
        fsync.fail_at, fsync.code = step, code
        with pytest.raises(StoreError) as caught:
            store.put(DIGEST, MANIFEST, TENSORS)
        assert os.strerror(code) in str(caught.value)
        assert str(root) not in str(caught.value)
        assert leftovers(root) == []
        if step <= 4:
            assert not store.exists(DIGEST)
        else:  # renamed but not acknowledged: whole
            assert read(store) == (MANIFEST, TENSORS)
        store.put(DIGEST, MANIFEST, TENSORS)
        assert read(store) == (MANIFEST, TENSORS)

    def test_opening_on_a_failing_disk(self, root: Path) -> None:
        with pytest.raises(StoreError, match="can't open the store: Input/output error"):
            LocalBlobStore(root, fsync=RecordingFsync(root, fail_at=1, code=errno.EIO))

    def test_another_writer_of_the_same_content_may_win(self, root: Path) -> None:
        winner = LocalBlobStore(root)

        def win(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("/blob"):
                winner.put(DIGEST, MANIFEST, TENSORS)
            os.fsync(fd)

        LocalBlobStore(root, fsync=win).put(DIGEST, MANIFEST, TENSORS)
        assert read(winner) == (MANIFEST, TENSORS)
        assert leftovers(root) == []


class TestStaging:
    def test_is_private_empty_and_removed(self, store: LocalBlobStore, root: Path) -> None:
        with store.staging() as one, store.staging() as two:
            assert one != two
            assert list(one.iterdir()) == []
            assert one.stat().st_mode & 0o077 == 0
            assert one.stat().st_dev == (root / "sha256").stat().st_dev
            (one / "deep").mkdir()
            (one / "deep" / "part").write_bytes(b"x")
        assert leftovers(root) == []

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), ValueError("x"), ConnectionResetError(104, "reset")]
    )
    def test_is_removed_when_the_body_fails(
        self, store: LocalBlobStore, root: Path, error: BaseException
    ) -> None:
        def upload() -> None:
            with store.staging() as staging:
                (staging / "part").write_bytes(b"x")
                raise error

        with pytest.raises(type(error)) as caught:
            upload()
        assert caught.value is error
        assert leftovers(root) == []

    def test_a_full_disk_in_the_body_is_a_store_error(self, store: LocalBlobStore, root: Path) -> None:
        def upload() -> None:
            with store.staging() as staging:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging))

        with pytest.raises(StoreError, match="No space left on device") as caught:
            upload()
        assert str(root) not in str(caught.value)

    def test_sweep_takes_the_old_and_leaves_what_still_grows(self, store: LocalBlobStore, root: Path) -> None:
        hour_ago = root.stat().st_mtime - 3600
        for name in ("dead", "growing"):
            (root / "staging" / name).mkdir()
            (root / "staging" / name / "part").write_bytes(b"x")
        os.utime(root / "staging" / "dead" / "part", (hour_ago, hour_ago))
        for name in ("dead", "growing"):
            os.utime(root / "staging" / name, (hour_ago, hour_ago))
        assert store.sweep_staging(older_than_s=600) == 1
        assert [path.name for path in (root / "staging").iterdir()] == ["growing"]
        assert store.sweep_staging(older_than_s=0) == 1
        assert store.sweep_staging(older_than_s=0) == 0


# One process that forks a victim per step: the victim kills itself as its n-th fsync begins.
KILLED_AT_EVERY_FSYNC = """
import json, os, signal, sys
from pathlib import Path
from adapters.store import LocalBlobStore

root, digest = Path(sys.argv[1]), sys.argv[2]
manifest, tensors = b"m" * 100, b"t" * 100_000
LocalBlobStore(root)
for step in range(1, 100):
    if (victim := os.fork()) == 0:
        calls = 0
        def fsync(fd):
            global calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            os.fsync(fd)
        LocalBlobStore(root, fsync=fsync).put(digest, manifest, tensors)
        os._exit(0)
    _, status = os.waitpid(victim, 0)
    store = LocalBlobStore(root)
    if visible := store.exists(digest):
        blob = store.read(digest)
        whole = blob.manifest == manifest and blob.tensors == tensors
    print(json.dumps({
        "killed": os.WIFSIGNALED(status),
        "visible": visible,
        "whole": visible and whole,
        "listed": list(store.iter_digests()) == [digest],
        "left": len(list((root / "staging").iterdir())),
        "swept": store.sweep_staging(0),
        "left_after": len(list((root / "staging").iterdir())),
    }))
    store.delete(digest)
    if not os.WIFSIGNALED(status):
        break
"""


def run_python(source: str, *arguments: str) -> list[dict[str, object]]:
    """The JSON lines that `source` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kill_9_at_every_step(root: Path) -> None:
    steps = run_python(KILLED_AT_EVERY_FSYNC, str(root), DIGEST)
    killed, finished = steps[:-1], steps[-1]
    assert len(killed) >= 8
    assert all(step["killed"] for step in killed)
    assert finished == {
        "killed": False,
        "visible": True,
        "whole": True,
        "listed": True,
        "left": 0,
        "swept": 0,
        "left_after": 0,
    }
    for step in killed:
        assert step["visible"] == step["whole"] == step["listed"]
        assert step["left_after"] == 0
    assert {step["visible"] for step in killed} == {False, True}
    assert any(step["left"] for step in killed)


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from adapters.errors import StoreError
from adapters.store import LocalBlobStore

root, digest = Path(sys.argv[1]), sys.argv[2]
store = LocalBlobStore(root)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

def attempt(action):
    try:
        action()
    except StoreError as error:
        return str(error)

def upload():
    with store.staging() as staging:
        (staging / "part").write_bytes(b"t" * 5000)

print(json.dumps({
    "put": attempt(lambda: store.put(digest, b"m", b"t" * 5000)),
    "upload": attempt(upload),
    "visible": store.exists(digest),
    "left": [path.name for path in root.rglob("*") if path.name not in ("sha256", "staging")],
    "small": attempt(lambda: store.put(digest, b"m", b"t" * 4000)),
}))
"""


def test_a_limit_of_the_real_file_system(root: Path) -> None:
    (outcome,) = run_python(FULL_DISK, str(root), DIGEST)
    assert "can't store a blob: File too large" in str(outcome["put"])
    assert "can't stage an upload: File too large" in str(outcome["upload"])
    assert outcome["visible"] is False
    assert outcome["left"] == []
    assert outcome["small"] is None
