"""Hostile uploads beside small requests: for how long does anybody else wait?

The gateway is a process of its own, on a socket; its backend is scripted, since in a deployment the engine is another
process too. Two things are measured per upload, each the best of several attempts:

- the worst delay of the small requests that a client sends all the while, over the worst without uploads. Other
  programs' work is in it.
- the longest time that the event loop stood still, without the time in which this process had work and no
  processor: of a pause, what the whole process computed in it, or what the loop's thread did not wait for a processor,
  whichever is less. Other programs' work is not in it, so a test can rely on it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from adapters.backbone_spec import ModuleShape
from adapters.site_maps import build_spec
from serving.deployments.interpreter import settle, take_turns
from tests.hostile.worst import KINDS, WIDTH, Request
from tests.unit.serving.http_support import BACKBONE, FakeBackend, gateway, listening

MAX_DELAY_S = 0.1
ATTEMPTS = 5
TICK_S = 0.002
BETWEEN_S = 0.004
ALONE_S = 1.0
SMALL = json.dumps({"model": BACKBONE, "prompt": "hi", "max_tokens": 3}).encode()


@dataclass(frozen=True)
class Found:
    """What one kind of upload did to the others, in seconds; and how long it took itself."""

    name: str
    status: int
    took_s: float
    pause_s: float
    delay_s: float
    alone_s: float

    @property
    def excess_s(self) -> float:
        """How much longer the slowest small request took than the slowest without an upload."""
        return max(0.0, self.delay_s - self.alone_s)


class Pulse:
    """The longest pause of the loop that this runs on, since it was last asked."""

    def __init__(self) -> None:
        self._longest = 0.0

    def take(self) -> float:
        """The longest one so far, in seconds; forgets it."""
        longest, self._longest = self._longest, 0.0
        return longest

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            began, used, waited = time.perf_counter(), time.process_time(), _waited_s()
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - began - TICK_S
            computed = time.process_time() - used
            self._longest = max(self._longest, min(late - (_waited_s() - waited), computed))


def _waited_s() -> float:
    """Seconds that this thread was ready to run and had no processor (Linux, Documentation/scheduler/sched-stats)."""
    return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9


def _wide_backend() -> FakeBackend:
    def shape_of(path: str) -> ModuleShape:
        last = path.rpartition(".")[2]
        kind = "norm" if "norm" in last else "embedding" if "embed" in last else "linear"
        return ModuleShape("layer" if last.isdigit() else kind, WIDTH, WIDTH, has_bias=False)

    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": WIDTH,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    return FakeBackend(spec=build_spec(config, shape_of, name=BACKBONE, digest="b" * 64, names=(BACKBONE,)))


def _serve(pipe: Connection) -> None:
    """The gateway's process: sends its address, then for every message its loop's longest pause; ends with the pipe."""

    async def serve() -> None:
        pulse, ended, loop = Pulse(), asyncio.Event(), asyncio.get_running_loop()

        def asked() -> None:
            try:
                pipe.recv()
            except EOFError:
                loop.remove_reader(pipe.fileno())
                ended.set()
            else:
                pipe.send(pulse.take())

        with tempfile.TemporaryDirectory(prefix="beside-") as home:
            async with gateway(Path(home), _wide_backend()) as made, listening(made.app) as address:
                settle()  # as every gateway does when it starts
                take_turns()
                beating = asyncio.create_task(pulse.beat())
                loop.add_reader(pipe.fileno(), asked)
                pipe.send(address)
                await ended.wait()
                beating.cancel()

    asyncio.run(serve())


@contextmanager
def _running() -> Iterator[tuple[tuple[str, int], Callable[[], float]]]:
    """A gateway's address, and what asks it for its longest pause since the last time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()

    def longest_pause() -> float:
        ours.send(None)
        return float(ours.recv())

    try:
        yield ours.recv(), longest_pause
    finally:
        ours.close()
        process.join()


def _slowest(connection: http.client.HTTPConnection, until: Callable[[], bool]) -> float:
    """Send small requests one after another, at least one; the longest that one took."""
    slowest = 0.0
    while True:
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", SMALL, {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200, reply.status
        slowest = max(slowest, time.perf_counter() - began)
        if until():
            return slowest
        time.sleep(BETWEEN_S)


class _Upload(threading.Thread):
    def __init__(self, address: tuple[str, int], request: Request) -> None:
        super().__init__()
        self._address, self._request = address, request
        self.status, self.took_s = 0, math.nan

    def run(self) -> None:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(*self._address)
        headers = {"content-type": self._request.content_type, **self._request.headers}
        try:
            connection.request("PUT", "/v1/adapters/delta/versions", self._request.body, headers)
            self.status = connection.getresponse().status
        except (BrokenPipeError, ConnectionResetError):  # refused before it was sent
            self.status = 0
        finally:
            connection.close()
        self.took_s = time.perf_counter() - began


def measure(
    names: Sequence[str] = tuple(KINDS),
    *,
    good: Callable[[Found], bool],
    attempts: int = ATTEMPTS,
    alone_s: float = ALONE_S,
) -> Iterator[Found]:
    """Send each kind until a result is `good`, at most `attempts` times; the least that each measure came to.

    Before each, small requests have the gateway to themselves for `alone_s`.
    Raises AssertionError where a hostile one is accepted, a valid one refused, or a small request not answered.
    """
    with _running() as (address, longest_pause):
        small = http.client.HTTPConnection(*address)
        for name in names:
            request, best = KINDS[name](), None
            for attempt in range(attempts):
                again = replace(request, headers={k: f"{v}-{attempt}" for k, v in request.headers.items()})
                ended = time.monotonic() + alone_s
                slowest_s = _slowest(small, lambda ended=ended: time.monotonic() > ended)
                longest_pause()
                upload = _Upload(address, again)
                upload.start()
                delay_s = _slowest(small, lambda upload=upload: not upload.is_alive())
                upload.join()
                found = Found(name, upload.status, upload.took_s, longest_pause(), delay_s, slowest_s)
                expected = (200, 201) if request.accepted else (0, 400, 413)
                assert upload.status in expected, f"{name}: answered {upload.status}"
                if best is not None:
                    least = min((best, found), key=lambda item: item.excess_s)
                    found = replace(least, pause_s=min(best.pause_s, found.pause_s))
                best = found
                if good(best):
                    break
            assert best is not None
            yield best
        small.close()


def main() -> int:
    """Print a table; the exit status: 1 where an upload delays the others by more than MAX_DELAY_S."""
    print(f"{'status':>6} {'took':>8} {'loop paused':>12} {'delay':>8} {'alone':>8}  upload")
    worst = Found("", 0, 0.0, 0.0, 0.0, 0.0)
    failed = False
    for found in measure(good=lambda item: max(item.pause_s, item.excess_s) <= MAX_DELAY_S):
        print(
            f"{found.status:6d} {found.took_s:6.1f} s {found.pause_s * 1e3:9.0f} ms {found.delay_s * 1e3:5.0f} ms "
            f"{found.alone_s * 1e3:5.0f} ms  {found.name}",
            flush=True,
        )
        failed |= max(found.pause_s, found.excess_s) > MAX_DELAY_S
        worst = replace(
            worst,
            pause_s=max(worst.pause_s, found.pause_s),
            delay_s=max(worst.delay_s, found.excess_s),
        )
    print(
        f"worst: the loop paused for {worst.pause_s * 1e3:.0f} ms of its own, a request was delayed by "
        f"{worst.delay_s * 1e3:.0f} ms (at most {MAX_DELAY_S * 1e3:.0f} are allowed)"
    )
    return int(failed)
