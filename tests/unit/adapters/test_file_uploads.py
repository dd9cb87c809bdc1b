"""Files in parts: bytes before rows, ended before removed, on both databases; and their tensors in bounded memory."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapters.canonical import stage_canonical, to_canonical
from adapters.collector import Collector
from adapters.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded, StoreError
from adapters.file_uploads import FileUploads
from adapters.migrations.uploads import UploadRecord
from adapters.quotas import UNLIMITED, Quota
from adapters.registry import Registry
from adapters.spool import Spool
from adapters.store import LocalBlobStore
from adapters.tensor_files import DTYPES, MappedFile, bytes_of, file_head, num_non_finite, views_of_file
from tests.unit.serving.http_support import Clock, lora

LIFETIME_S, LINGER_S = 100.0, 50.0


class World:
    """A registry and a spool under a clock of the test's."""

    def __init__(self, url: str, root: Path) -> None:
        self.clock = Clock()
        self.registry = Registry(url, clock=self.clock)
        self.spool = Spool(root / "spool")
        self.files = FileUploads(self.registry.uploads, self.spool, lifetime_s=LIFETIME_S, linger_s=LINGER_S)

    def begin(self, size: int, quota: Quota = UNLIMITED) -> UploadRecord:
        return self.registry.uploads.create(
            "t",
            filename="f",
            purpose="p",
            size_bytes=size,
            sha256=None,
            lifetime_s=LIFETIME_S,
            quota=quota,
        )

    def part(self, upload_id: str, data: bytes) -> str:
        writer = self.spool.open_part(upload_id)
        try:
            writer.write(data)
            return self.files.add_part("t", upload_id, writer, sha256=None).sha256
        finally:
            writer.close()

    def complete(self, upload_id: str, *parts: str) -> UploadRecord:
        return self.files.complete("t", upload_id, parts, md5=None, sha256=None)


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = World(url, tmp_path)
    yield made
    made.registry.close()


def test_parts_become_a_file_in_the_order_of_their_names(world: World) -> None:
    upload = world.begin(8)
    two, one = world.part(upload.id, b"5678"), world.part(upload.id, b"1234")
    assert world.part(upload.id, b"1234") == one == hashlib.sha256(b"1234").hexdigest()
    with pytest.raises(InvalidRequest, match="9 bytes"):
        world.part(upload.id, b"9")
    done = world.complete(upload.id, one, two)
    assert done.file_id
    name, path = world.files.open_file("t", done.file_id)
    assert (name, path.read_bytes()) == ("f", b"12345678")
    assert world.complete(upload.id, one, two) == done
    with pytest.raises(Conflict):
        world.part(upload.id, b"1234")
    with pytest.raises(Conflict):
        world.registry.uploads.cancel("t", upload.id)
    with pytest.raises(NotFound):
        world.files.open_file("other", done.file_id)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_has_ended_goes_a_while_after(world: World, tmp_path: Path) -> None:
    cancelled, old, done = (world.begin(3).id for _ in range(3))
    for upload_id in (cancelled, old, done):
        part = world.part(upload_id, b"abc")
    assert world.registry.uploads.cancel("t", cancelled).status == "cancelled"
    file_id = world.complete(done, part).file_id
    assert file_id
    path = world.files.open_file("t", file_id)[1]
    collector = Collector(world.registry, LocalBlobStore(tmp_path / "blobs"), grace_s=0, files=world.files)
    assert collector.collect().uploads == 0
    world.clock.now += LIFETIME_S
    assert world.registry.uploads.get("t", old)[0].status == "expired"
    with pytest.raises(Conflict):
        world.part(old, b"abc")
    with pytest.raises(NotFound):
        world.files.open_file("t", file_id)
    assert collector.collect().uploads == 1  # the cancelled one; the others end now
    assert path.read_bytes() == b"abc"  # a publication that has just opened it goes on
    world.clock.now += LINGER_S
    assert collector.collect().uploads == 2
    assert world.registry.uploads.known() == frozenset()
    assert [entry.name for entry in (tmp_path / "spool").iterdir()] == ["staging"]


def test_an_expired_upload_makes_room_at_once(world: World) -> None:
    quota = Quota(max_files=1)
    world.begin(3, quota)
    with pytest.raises(QuotaExceeded):
        world.begin(3, quota)
    world.clock.now += LIFETIME_S
    world.begin(3, quota)


def test_a_sweep_that_broke_off_is_finished_by_the_next(world: World, tmp_path: Path) -> None:
    upload = world.begin(3)
    world.part(upload.id, b"abc")
    world.registry.uploads.cancel("t", upload.id)
    world.clock.now += LINGER_S
    world.spool.remove(upload.id)  # and then it was killed
    assert world.files.sweep() == 1
    stray = tmp_path / "spool" / f"upload_{'0' * 32}"
    stray.mkdir()
    os.utime(stray, (0, 0))
    assert world.files.sweep() == 1
    assert not stray.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_a_typed_error_and_leaves_the_upload_open(tmp_path: Path, code: int) -> None:
    broken = False

    def fsync(fd: int) -> None:
        if broken:
            raise OSError(code, os.strerror(code))
        os.fsync(fd)

    world = World(f"sqlite:///{tmp_path}/r.db", tmp_path)
    world.spool = world.files.spool = Spool(tmp_path / "spool", fsync=fsync)
    upload = world.begin(6)
    first = world.part(upload.id, b"abc")
    broken = True
    for attempt in (lambda: world.part(upload.id, b"def"), lambda: world.complete(upload.id, first, first)):
        with pytest.raises(StoreError, match=os.strerror(code)) as caught:
            attempt()
        assert str(tmp_path) not in str(caught.value)
    broken = False
    second = world.part(upload.id, b"def")
    assert world.complete(upload.id, first, second).status == "completed"
    world.registry.close()


# -- tensors ---------------------------------------------------------------------------------------------------


def test_a_files_head_is_what_the_library_writes() -> None:
    for seed in range(100):
        draw = random.Random(seed)
        tensors = {
            f"{draw.getrandbits(128):032x}": torch.zeros(
                [draw.randint(0, 4) for _ in range(draw.randint(0, 3))],
                dtype=draw.choice(list(DTYPES.values())),
            )
            for _ in range(draw.randint(0, 9))
        }
        head, order = file_head(tensors)
        data = b"".join(bytes(tensors[name].numel() * tensors[name].itemsize) for name in order)
        assert head + data == save(tensors)
        for name, tensor in views_of_file(save(tensors)).items():
            assert torch.equal(tensor, tensors[name])
            assert tensor.dtype == tensors[name].dtype


def test_a_staged_delta_is_the_one_in_memory(tmp_path: Path) -> None:
    delta, between = lora(7), []
    staged = stage_canonical(delta, tmp_path / "tensors", between=lambda: between.append(1))
    whole = to_canonical(delta)
    assert (staged.manifest, staged.tensors.read_bytes(), staged.digest, staged.size_bytes) == (
        whole.manifest,
        whole.tensors,
        whole.digest,
        whole.size_bytes,
    )
    assert between


def test_non_finite_values_are_counted_in_every_piece() -> None:
    tensor = torch.zeros(3, 200_000)
    tensor[0, 0] = tensor[2, -1] = torch.nan
    tensor[1, 7] = torch.inf
    assert num_non_finite(tensor) == num_non_finite(tensor.t()) == 3
    assert bytes_of(torch.ones(2)) == bytes_of(torch.ones(2)).tobytes()


def test_a_mapped_file_is_let_go_of(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(os.urandom(1 << 20) * (size >> 20))
    mapped = MappedFile(tmp_path / "file")
    gc.collect()

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile"))

    before = resident()
    tensor = torch.frombuffer(mapped.buffer, dtype=torch.uint8)
    total = int(tensor.sum())
    assert resident() - before > size / 2
    mapped.let_go()
    assert resident() - before < size / 8
    assert int(tensor.sum()) == total  # it comes back
