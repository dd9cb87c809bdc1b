"""Kill -9 at every step: is anything acknowledged lost, half-visible, or left behind?

    python -m tests.crash [--kills 1000] [--seed N] [--database sqlite|postgresql] [--workers 2] [--http]

Workers upload, move aliases, delete, undelete and collect in the same database and store, over contents that they
share. Each is killed at a step chosen at random from all steps of a kind of operation (`failpoints.py`), or lives.
When all have ended, what each worker was told must hold, the operation in which it was killed must have happened
wholly or not at all, and every stored blob must be whole; and when everything unused is collected, nothing but what
live versions need may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from adapters.canonical import Canonical, digest_of, to_canonical
from adapters.collector import Collector
from adapters.file_uploads import FileUploads
from adapters.registry import Registry
from adapters.spool import Spool
from adapters.store import LocalBlobStore
from tests import postgres
from tests.crash.model import Model, observed
from tests.crash.worker import HTTP_TENANT, LIFETIME_S, SPOOL, Plan, work
from tests.unit.serving.http_support import lora

NUM_CONTENTS = 24  # enough that most uploads store new bytes, few enough that workers meet
# to be killed in, as often as they have steps
OPERATIONS = ("upload",) * 4 + ("collect",) * 3 + ("alias", "delete_version", "delete_adapter", "undelete")
FAR_S = 1e6


@dataclass
class Tally:
    """What has happened so far."""

    killed_at: Counter[str] = field(default_factory=Counter)
    acknowledged: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    most_steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 20))
    outcomes: Counter[str] = field(default_factory=Counter)
    collections: int = 0


class Suite:
    """Rounds of workers over one database and one store. Raises AssertionError where a promise is broken."""

    def __init__(self, url: str, root: Path, *, seed: int, workers: int, http: bool) -> None:
        self.url, self.root, self.http = url, root, http
        self.random = random.Random(seed)
        self.contents: list[Canonical] = [to_canonical(lora(seed)) for seed in range(NUM_CONTENTS)]
        self.digests = [content.digest for content in self.contents]
        tenants = [HTTP_TENANT] if http else [f"worker{index}" for index in range(workers)]
        self.models = {tenant: Model() for tenant in tenants}
        self.tally = Tally()
        Registry(url).close()
        LocalBlobStore(root)

    def round(self) -> int:
        """Run all workers once and check what they leave; how many were killed."""
        started = [(tenant, *self._start(tenant)) for tenant in self.models]
        killed = 0
        with Registry(self.url) as registry:
            for tenant, pid, pipe in started:
                with os.fdopen(pipe) as lines:
                    messages = [json.loads(line) for line in lines]
                _, status = os.waitpid(pid, 0)
                assert os.WIFSIGNALED(status) or status == 0, f"a worker failed: {messages[-3:]}"
                killed += os.WIFSIGNALED(status)
                self._follow(tenant, messages, registry)
            self._check_blobs(registry)
        if self.random.random() < 0.3:
            self.collect_all()
        return killed

    def _start(self, tenant: str) -> tuple[int, int]:
        operation = self.random.choice(OPERATIONS)
        kill = (operation, self.random.randint(1, self.tally.most_steps[operation]))
        plan = Plan(
            self.url, self.root, tenant, seed=self.random.getrandbits(32), num_operations=12, http=self.http,
            kill=kill if self.random.random() < 0.9 else None,
        )  # fmt: skip
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            return pid, reader
        status = 1
        try:
            os.close(reader)
            work(plan, self.models[tenant], self.contents, writer)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _follow(self, tenant: str, messages: list[dict[str, object]], registry: Registry) -> None:
        """Advance the tenant's model by what was acknowledged, and decide about the operation under way."""
        model, pending = self.models[tenant], None
        for message in messages:
            match message:
                case {"start": [*operation]}:
                    pending = tuple(operation)
                case {"done": str(kind), "steps": int(steps)}:
                    assert pending is not None
                    model, pending = model.after(pending, self.digests), None
                    self.tally.acknowledged[kind] += 1
                    self.tally.most_steps[kind] = max(
                        steps, self.tally.most_steps[kind] * (kind == "collect")
                    )
                case {"refused": str(kind), "kind": str(operation)}:
                    pending = None
                    self.tally.refused[f"{operation}: {kind}"] += 1
                case {"killed": str(name)}:
                    self.tally.killed_at[name] += 1
        shown = observed(registry, tenant)
        if pending is not None and shown != model.snapshot():
            model = model.after(pending, self.digests)
            self.tally.outcomes["happened"] += 1
        elif pending is not None:
            self.tally.outcomes["did not happen, or shows nothing"] += 1
        assert shown == model.snapshot(), (
            f"{tenant} sees {shown}, was promised {model.snapshot()}, {messages[-3:]}"
        )
        self.models[tenant] = model

    def _check_blobs(self, registry: Registry) -> None:
        """Every live version's bytes are there, and every stored blob is whole."""
        store = LocalBlobStore(self.root)
        stored = set(store.iter_digests())
        assert registry.live_digests() <= stored, "the bytes of an acknowledged upload are lost"
        for digest in stored:
            blob = store.read(digest)
            assert digest_of(blob.manifest, blob.tensors) == digest, "a blob is half there"

    def collect_all(self) -> None:
        """Collect as if much time had passed: nothing but what live versions need may be left."""
        store = LocalBlobStore(self.root)
        store.sweep_staging(0)
        with Registry(self.url, clock=lambda: time.time() + FAR_S) as registry:
            files = FileUploads(
                registry.uploads, Spool(self.root / SPOOL), lifetime_s=LIFETIME_S, linger_s=0.0
            )
            collector = Collector(registry, store, grace_s=0, files=files)
            collector.collect()
            live = registry.live_digests()
        assert set(store.iter_digests()) == live, "orphans after collection"
        assert list((self.root / "staging").iterdir()) == [], "staging after collection"
        left = [path.name for path in (self.root / SPOOL).iterdir() if path.name != "staging"]
        assert left == [], "uploads after collection"
        for model in self.models.values():
            model.forget_deleted()
        self.tally.collections += 1


def run(
    kills: int, *, seed: int, database: str, workers: int, http: bool, report: Callable[[int], None]
) -> Tally:
    """Rounds until so many workers have been killed; `report` is told each hundred. Raises AssertionError."""
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="crash-"))
        stack.callback(shutil.rmtree, directory)
        url = f"sqlite:///{directory}/registry.db"
        if database == "postgresql":
            binaries = postgres.find_binaries()
            assert binaries is not None, "PostgreSQL is not installed (apt-get install postgresql)"
            url = stack.enter_context(postgres.running(binaries)).make_database()
        suite = Suite(url, directory / "blobs", seed=seed, workers=workers, http=http)
        done = 0
        while done < kills:
            before, done = done, done + suite.round()
            if before // 100 < done // 100:
                report(done)
        suite.collect_all()
    return suite.tally


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--http", action="store_true", help="one worker, uploading through the gateway")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    tally = run(
        given.kills,
        seed=given.seed,
        database=given.database,
        workers=given.workers,
        http=given.http,
        report=lambda done: print(f"{done} kills, {time.monotonic() - began:.0f} s", flush=True),
    )
    print("killed at:")
    for name, count in sorted(tally.killed_at.items()):
        print(f"  {count:5d}  {name}")
    kills = sum(tally.killed_at.values())
    print(f"{kills} kills at {len(tally.killed_at)} kinds of step; the operation {dict(tally.outcomes)}")
    print(f"acknowledged {dict(tally.acknowledged)}, refused {dict(tally.refused)}")
    print(
        f"0 lost, 0 half-visible; 0 orphans in {tally.collections} collections ({time.monotonic() - began:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
