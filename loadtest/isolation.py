"""Tenants apart, with the right answer known for every token.

16 tenants with keys of their own share a server over HTTP. They have 200 deltas of eight methods that sign every token
(see `signed.py`), under the same names, and ask for their own by name, alias, version and digest, for those that others
grant them, for others' private ones (404, or it is a violation) and for the bare backbone, whose answers are known.
Meanwhile aliases move, new versions come, grants end and begin again, some callers leave in mid-stream, the device has
room for a fraction of the deltas, and replicas are killed (SIGKILL) at random. A request that a kill breaks must end in
a true error, and what it gave before that must be right.

  foreign   tokens that another delta signs with
  base      tokens that no delta signs with, in an answer for a delta
  bare      tokens of the bare backbone that are not what the same prompt gave before there was a delta

--server ray (default): `deltamux serve` with two replicas and all its processes. --server local: the same application
over one engine of this process, without Ray and kills, for trying out. Exit status 1 where a token was wrong, a private
delta or an old alias was seen, an error came without a kill, or nothing was evicted. --tokens 10000000 is the long
mode: the table has tokens/s and what 10 M tokens take; a line a minute goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import torch

from loadtest.backbones import SIZES
from loadtest.churn import NAME, Soak, Tally, Target
from loadtest.deltas import placed_bytes
from loadtest.estate import Estate
from loadtest.inprocess import slot_bytes
from loadtest.report import Record, Spread, make_parser, publish
from loadtest.server import ServerProcess, application, write_backbone
from loadtest.signed import HEAD_EVERY, delta_of_any_method, head_of
from serving.config import Auth, Database, Engine, Settings, Store
from serving.config import Backbone as BackboneSettings
from serving.model.backbone import Backbone, load_backbone

LONG_MODE_TOKENS = 10_000_000
REPLICAS = 2
TOKENS_PER_KILL = 500_000
TIMEOUT_S = 900.0


def engine_settings(backbone: Backbone, args: argparse.Namespace) -> Engine:
    """Rows for half of what is in flight and a half more, and memory for them and for `room` deltas of mean size."""
    head, count = head_of(backbone), min(args.deltas, HEAD_EVERY)
    sizes = [placed_bytes(delta_of_any_method(backbone, head, i), backbone) for i in range(count)]
    rows = max(2, args.in_flight * 3 // 4 // (REPLICAS if args.server == "ray" else 1))
    memory = rows * slot_bytes(backbone) + max(*sizes, args.room * sum(sizes) // len(sizes))
    return Engine(
        max_num_seqs=rows,
        memory_bytes=memory,
        host_cache_bytes=memory,
        num_threads=1,
        max_queue=args.in_flight,
        max_queue_s=TIMEOUT_S,
    )


@asynccontextmanager
async def local(root: Path, engine: Engine) -> AsyncIterator[Target]:
    """The application in this process."""
    settings = Settings(
        backbone=BackboneSettings(path=str(root / NAME)),
        engine=engine,
        store=Store(path=str(root / "blobs")),
        database=Database(url=f"sqlite:///{root}/registry.db"),
        auth=Auth(secret_file=root / "secret"),
    )
    async with application(settings) as (app, key):
        transport = httpx.ASGITransport(app=app)
        yield Target(
            lambda key: httpx.AsyncClient(
                base_url="http://local", transport=transport, headers=_authorized(key)
            ),
            key,
        )


@asynccontextmanager
async def ray(root: Path, engine: Engine) -> AsyncIterator[Target]:
    """A server of its own, ended with the block."""
    given = engine.model_dump(exclude_unset=True)
    variables = {f"DELTAMUX_ENGINE__{name.upper()}": str(value) for name, value in given.items()}
    server = ServerProcess(root / NAME, root / "home", variables)
    try:
        key = server.bootstrap()
        await asyncio.to_thread(server.start, replicas=REPLICAS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        yield Target(
            lambda key: httpx.AsyncClient(
                base_url=server.url, timeout=TIMEOUT_S, limits=limits, headers=_authorized(key)
            ),
            key,
            server.replicas,
        )
        await asyncio.to_thread(server.end, signal.SIGTERM)
    finally:
        server.kill_all()


def _authorized(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def soak(root: Path, args: argparse.Namespace) -> Tally:
    """Run it in `root`; `problems` of the tally says what must not have been."""
    write_backbone(args.size, root / NAME)
    backbone = load_backbone(str(root / NAME), device="cpu", dtype="float32")
    engine = engine_settings(backbone, args)
    tenants = [f"tenant-{i}" for i in range(args.tenants)]
    estate = Estate(tenants, output_tokens=args.output_tokens, seed=args.seed)
    async with AsyncExitStack() as stack:
        server = local(root, engine) if args.server == "local" else ray(root, engine)
        run = Soak(await stack.enter_async_context(server), backbone, estate, seed=args.seed)
        await run.prepare(stack, args.deltas)
        await run.run(args.tokens, in_flight=args.in_flight, kills=args.kills)
    if not run.tally.evictions:
        run.tally.problem("no delta was evicted: there was room for all of them")
    return run.tally


def main(argv: Sequence[str]) -> None:
    """Soak, print the tally, and exit 1 where something was wrong."""
    parser = make_parser("isolation", __doc__, rounds=1)
    parser.add_argument("--server", choices=("ray", "local"), default="ray")
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument("--deltas", type=int, default=200)
    parser.add_argument("--room", type=int, default=20, help="deltas of mean size that fit beside full rows")
    parser.add_argument("--in-flight", type=int, default=96)
    parser.add_argument(
        "--output-tokens", type=int, default=480, help="of one request: so many, or down to half"
    )
    parser.add_argument(
        "--kills", type=int, help=f"default: one, and one more every {TOKENS_PER_KILL} tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.kills is None:
        args.kills = 0 if args.server == "local" else 1 + args.tokens // TOKENS_PER_KILL
    if args.server == "local" and args.kills:
        parser.error("--kills: --server local has no replicas")
    torch.set_num_threads(1)
    with _ended_in_order(), tempfile.TemporaryDirectory(prefix="deltamux-isolation-") as root:
        tally = asyncio.run(soak(Path(root), args))
    publish(
        f"isolation of {args.tenants} tenants, {args.deltas} deltas, room for {args.room}, {args.size} float32",
        shlex.join(["isolation", *argv]),
        [_record(tally, args)],
        args.json,
    )
    if tally.problems or tally.wrong:
        sys.exit(1)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have SIGTERM unwind the block: by itself it would leave the server behind."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _record(tally: Tally, args: argparse.Namespace) -> Record:
    speed = tally.tokens / tally.seconds
    facts = {
        "tokens": tally.tokens,
        "foreign": tally.foreign,
        "base": tally.base,
        "bare and wrong": tally.bare,
        "replicas killed": tally.kills,
        "evictions": int(tally.evictions),
        **{f"requests, {kind}": number for kind, number in sorted(tally.kinds.items())},
        **{f"ended: {end}": number for end, number in sorted(tally.ends.items())},
        **dict(sorted(tally.changes.items())),
        "problems": len(tally.problems),
        "minutes for 10 M tokens": LONG_MODE_TOKENS / speed / 60,
    }
    return Record(f"{args.in_flight} in flight, {args.server}", {"tok/s": Spread.of([speed])}, facts)
