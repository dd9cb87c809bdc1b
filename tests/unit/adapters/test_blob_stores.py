"""What every blob store promises, on a local directory and on an S3 server; then what is an object store's own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from adapters.errors import InvalidReference, StoreError
from adapters.object_store import ObjectBlobStore
from adapters.store import Blob, BlobStore, LocalBlobStore, open_store
from tests.s3 import CREDENTIALS, S3Server

DIGEST = "ab" + "0123456789abcdef" * 3 + "0" * 14
OTHER = "cd" + DIGEST[2:]
MANIFEST, TENSORS = b'{"format":"deltamux/1"}', bytes(range(256)) * 40
WHOLE = Blob(MANIFEST, TENSORS)
LARGE = bytes(range(251)) * (9 << 12)
"""More than one part of a file that is sent in parts."""
STORE_AND_TELL = """
import pathlib, sys
from adapters.object_store import ObjectBlobStore

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

store = ObjectBlobStore(sys.argv[1])
store.put("a" * 64, b"manifest", b"tensors")
before = peak()
store.put("b" * 64, b"manifest", pathlib.Path(sys.argv[2]))
print(peak() - before)
"""
"""Its output: the bytes by which the process grew while it stored a file."""


@pytest.fixture(params=["local", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "blobs")
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.make_bucket()


@pytest.fixture
def store(location: str) -> BlobStore:
    return open_store(location)


class TestEveryStore:
    def test_stores_bytes(self, store: BlobStore) -> None:
        assert not store.exists(DIGEST)
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.exists(DIGEST)
        assert store.read(DIGEST) == WHOLE
        assert not store.exists(OTHER)

    def test_reads_by_range(self, store: BlobStore) -> None:
        store.put("a" * 64, b"manifest", b"0123456789")
        assert list(store.sizes("a" * 64).items()) == [("manifest.json", 8), ("tensors.safetensors", 10)]
        for start, stop in ((0, 10), (3, 5), (9, 10), (4, 4)):
            got = store.read_range("a" * 64, "tensors.safetensors", start, stop)
            assert got == b"0123456789"[start:stop]
        for call in (
            lambda: store.sizes("b" * 64),
            lambda: store.read_range("b" * 64, "manifest.json", 0, 1),
        ):
            with pytest.raises(StoreError):
                call()

    def test_copies_a_file(self, store: BlobStore, tmp_path: Path) -> None:
        source = tmp_path / "mine.safetensors"
        source.write_bytes(TENSORS)
        store.put(DIGEST, MANIFEST, source)
        source.write_bytes(b"x" * len(TENSORS))
        assert store.read(DIGEST) == WHOLE

    def test_an_empty_pair_is_a_blob(self, store: BlobStore) -> None:
        store.put(DIGEST, b"", b"")
        assert store.exists(DIGEST)
        assert store.read(DIGEST) == Blob(b"", b"")

    def test_a_blob_larger_than_one_part(self, store: BlobStore) -> None:
        store.put(DIGEST, MANIFEST, TENSORS * 1000)
        assert store.read(DIGEST) == Blob(MANIFEST, TENSORS * 1000)

    def test_the_same_again_changes_nothing(self, store: BlobStore) -> None:
        for _ in range(3):
            store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE
        assert list(store.iter_digests()) == [DIGEST]

    def test_refuses_another_content_for_a_digest(self, store: BlobStore) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        with pytest.raises(StoreError):
            store.put(DIGEST, MANIFEST, TENSORS + b"x")
        with pytest.raises(StoreError):
            store.put(DIGEST, MANIFEST + b"x", TENSORS)
        assert store.read(DIGEST) == WHOLE

    def test_deletes_whole_and_an_absent_blob_is_no_error(self, store: BlobStore) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        store.put(OTHER, MANIFEST, TENSORS)
        store.delete(DIGEST)
        store.delete(DIGEST)
        assert list(store.iter_digests()) == [OTHER]
        assert not store.exists(DIGEST)
        with pytest.raises(StoreError, match="is not in the store"):
            store.read(DIGEST)
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE

    def test_lists_every_digest_once(self, store: BlobStore) -> None:
        digests = [f"{index:064x}" for index in range(30)]
        assert list(store.iter_digests()) == []
        for digest in digests:
            store.put(digest, b"m", b"t")
        assert sorted(store.iter_digests()) == digests

    def test_reopens(self, store: BlobStore, location: str) -> None:
        store.put(DIGEST, MANIFEST, TENSORS)
        assert open_store(location).read(DIGEST) == WHOLE

    def test_many_writers_of_the_same_content(self, store: BlobStore) -> None:
        start = threading.Barrier(8)

        def put(_: int) -> Blob:
            start.wait()
            store.put(DIGEST, MANIFEST, TENSORS)
            return store.read(DIGEST)

        with ThreadPoolExecutor(8) as pool:
            assert all(blob == WHOLE for blob in pool.map(put, range(8)))
        assert list(store.iter_digests()) == [DIGEST]

    @pytest.mark.parametrize(
        "digest",
        ["", "..", "../../etc/passwd", "/etc/passwd", DIGEST.upper(), DIGEST[:-1], DIGEST + "\n", "g" * 64],
    )
    def test_only_digests_become_paths(self, store: BlobStore, digest: str) -> None:
        attempts: list[Callable[[], object]] = [
            lambda: store.put(digest, MANIFEST, TENSORS),
            lambda: store.read(digest),
            lambda: store.exists(digest),
            lambda: store.delete(digest),
        ]
        for attempt in attempts:
            with pytest.raises(InvalidReference):
                attempt()
        assert list(store.iter_digests()) == []


def test_a_path_is_a_directory(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path / "a")), LocalBlobStore)


@pytest.mark.parametrize("url", ["file:///tmp/x", "memory://", "http://host/x", "ftp://host/x", "://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="The store's URL begins with"):
        open_store(url)


class TestObjectStore:
    @pytest.fixture
    def bucket(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        return s3.make_bucket()

    def test_the_manifest_makes_the_blob(self, bucket: str) -> None:
        store = ObjectBlobStore(bucket)
        store.put(DIGEST, MANIFEST, TENSORS)
        objects = from_url(bucket)
        obstore.delete(objects, f"sha256/{DIGEST}/manifest.json")
        assert not store.exists(DIGEST)
        assert list(store.iter_digests()) == [DIGEST], "half a blob must be found by the collector"
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE
        obstore.delete(objects, f"sha256/{DIGEST}/tensors.safetensors")
        with pytest.raises(StoreError, match="is damaged"):
            store.read(DIGEST)

    def test_half_a_blob_is_deleted(self, bucket: str) -> None:
        store = ObjectBlobStore(bucket)
        obstore.put(from_url(bucket), f"sha256/{DIGEST}/tensors.safetensors", b"x")
        with pytest.raises(StoreError, match="holds 1 other bytes"):
            store.put(DIGEST, MANIFEST, TENSORS)
        assert not store.exists(DIGEST)
        store.delete(DIGEST)
        assert list(store.iter_digests()) == []

    def test_foreign_objects_are_no_blobs(self, bucket: str) -> None:
        store = ObjectBlobStore(bucket)
        for path in ("sha256/notes.txt", "sha256/ab/x", "other/x"):
            obstore.put(from_url(bucket), path, b"x")
        assert list(store.iter_digests()) == []

    def test_two_prefixes_of_a_bucket_are_two_stores(self, bucket: str) -> None:
        one, two = ObjectBlobStore(bucket), ObjectBlobStore(f"{bucket}-2")
        one.put(DIGEST, MANIFEST, TENSORS)
        assert not two.exists(DIGEST)
        assert list(two.iter_digests()) == []

    def test_a_killed_writer_leaves_what_the_collector_finds(self, bucket: str) -> None:
        store, staged = ObjectBlobStore(bucket), f"sha256/{DIGEST}/tensors.staged"
        obstore.put(from_url(bucket), staged, b"half")
        assert list(store.iter_digests()) == [DIGEST]
        store.delete(DIGEST)
        assert list(store.iter_digests()) == []

    def test_a_large_file_is_staged_and_never_overwrites(self, bucket: str, tmp_path: Path) -> None:
        store, file = ObjectBlobStore(bucket), tmp_path / "large"
        objects, path = from_url(bucket), f"sha256/{DIGEST}/tensors.safetensors"
        file.write_bytes(LARGE)
        for other in (LARGE[:-1] + b"?", LARGE[:-1], LARGE + b"?"):
            obstore.put(objects, path, other)
            with pytest.raises(StoreError, match=f"holds {len(other)} other bytes"):
                store.put(DIGEST, MANIFEST, file)
            assert bytes(obstore.get(objects, path).bytes()) == other
            assert not store.exists(DIGEST)
        obstore.delete(objects, path)
        store.put(DIGEST, MANIFEST, file)
        assert store.read(DIGEST) == Blob(MANIFEST, LARGE)
        names = {item["path"].rpartition("/")[2] for page in obstore.list(objects) for item in page}
        assert names == {"manifest.json", "tensors.safetensors"}

    def test_many_writers_of_the_same_large_file(self, bucket: str, tmp_path: Path) -> None:
        store, file = ObjectBlobStore(bucket), tmp_path / "large"
        file.write_bytes(LARGE)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: store.put(DIGEST, MANIFEST, file), range(3)))
        assert store.read(DIGEST) == Blob(MANIFEST, LARGE)

    def test_memory_stays_bounded_while_a_large_file_is_stored(self, bucket: str, tmp_path: Path) -> None:
        with (tmp_path / "large").open("wb") as file:
            file.truncate(96 << 20)
        command = [sys.executable, "-c", STORE_AND_TELL, bucket, str(tmp_path / "large")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert int(done.stdout) < 64 << 20, f"memory grew by {int(done.stdout) >> 20} MiB"

    def test_no_such_bucket(self, bucket: str) -> None:
        with pytest.raises(StoreError, match="can't be opened"):
            ObjectBlobStore("s3://canary-bucket/x")


FAST_CLIENT = {"connect_timeout": timedelta(seconds=1), "timeout": timedelta(seconds=2)}
FAST_RETRY = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=2),
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2)},
}
EMPTY_LIST = b'<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>0</KeyCount></ListBucketResult>'


class Faulty:
    """An S3 server for one object; `script` gives the status of a method's next answers, 200 when it is used up."""

    def __init__(self) -> None:
        self.script: dict[str, list[int]] = {}
        self.objects: dict[str, bytes] = {}
        self.spoils: Callable[[bytes], bytes] = lambda data: data
        self.seen: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[str]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                path, _, query = self.path.partition("?")
                method = "LIST" if "list-type" in query else self.command
                outer.seen[method] += 1
                pending = outer.script.get(method)
                status, answer = pending.pop(0) if pending else 200, b""
                if status == 200:
                    if method == "LIST":
                        answer = EMPTY_LIST
                    elif method == "PUT" and path in outer.objects:
                        status = 412
                    elif method == "PUT":
                        assert self.headers["if-none-match"] == "*", "an unconditional write"
                        outer.objects[path] = outer.spoils(body)
                    elif method == "GET" and path in outer.objects:
                        answer = outer.objects[path]
                    elif method == "GET":
                        status = 404
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.send_header("etag", '"x"')
                self.send_header("last-modified", "Fri, 20 Nov 2026 00:00:00 GMT")
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Faulty, ObjectBlobStore]]:
    server = Faulty()
    with server.running() as endpoint:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        client = {**FAST_CLIENT, "allow_http": True}
        yield server, ObjectBlobStore("s3://canary/deltas", client_options=client, retry_config=FAST_RETRY)


class TestFaults:
    """Errors have our words, no names of theirs; what can pass by itself is tried again."""

    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            (401, "does not accept the credentials"),
            (403, "access is denied"),
            (404, "no such bucket"),
            (500, "did not answer, or answered with an error"),
            (503, "did not answer, or answered with an error"),
        ],
    )
    def test_a_put_that_fails(self, faulty: tuple[Faulty, ObjectBlobStore], status: int, reason: str) -> None:
        server, store = faulty
        server.script["PUT"] = [status] * 20
        with pytest.raises(StoreError, match=reason) as caught:
            store.put(DIGEST, MANIFEST, TENSORS)
        assert caught.value.remedy
        assert "canary" not in str(caught.value)
        assert server.objects == {}
        server.script.clear()
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE

    def test_slow_down_is_tried_again(self, faulty: tuple[Faulty, ObjectBlobStore]) -> None:
        server, store = faulty
        server.script = {"PUT": [503, 503], "GET": [503]}
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE

    @pytest.mark.parametrize("status", [409, 412])
    def test_another_writer_that_has_not_finished(
        self, faulty: tuple[Faulty, ObjectBlobStore], status: int
    ) -> None:
        server, store = faulty
        server.script["PUT"] = [status]  # someone is creating it, and gives up
        store.put(DIGEST, MANIFEST, TENSORS)
        assert store.read(DIGEST) == WHOLE
        assert server.seen["PUT"] == 3
        server.objects.clear()
        server.script["PUT"] = [status] * 20
        with pytest.raises(StoreError, match="another writer was in the way"):
            store.put(DIGEST, MANIFEST, TENSORS)
        assert server.objects == {}

    def test_bytes_that_changed_on_the_way_are_found_before_the_blob_exists(
        self, faulty: tuple[Faulty, ObjectBlobStore]
    ) -> None:
        server, store = faulty
        server.spoils = lambda data: data[:-1] + b"?"
        with pytest.raises(StoreError, match="other bytes"):
            store.put(DIGEST, MANIFEST, TENSORS)
        assert [path for path in server.objects if path.endswith("manifest.json")] == []

    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "LIST"])
    @pytest.mark.parametrize("status", [403, 503])
    def test_every_other_call_that_fails(
        self, faulty: tuple[Faulty, ObjectBlobStore], method: str, status: int
    ) -> None:
        server, store = faulty
        attempts: dict[str, Callable[[], object]] = {
            "GET": lambda: store.read(DIGEST),
            "HEAD": lambda: store.exists(DIGEST),
            "DELETE": lambda: store.delete(DIGEST),
            "LIST": lambda: list(store.iter_digests()),
        }
        server.script = {key: [status] * 20 for key in (method, "POST")}
        with pytest.raises(StoreError) as caught:
            attempts[method]()
        assert "canary" not in str(caught.value)

    def test_no_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}.items():
            monkeypatch.setenv(name, value)
        client = {**FAST_CLIENT, "allow_http": True}
        with pytest.raises(StoreError, match="can't be opened: it did not answer") as caught:
            ObjectBlobStore("s3://canary/x", client_options=client, retry_config=FAST_RETRY)
        assert "canary" not in str(caught.value)
