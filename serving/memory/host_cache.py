"""Deltas in host RAM: digest -> Delta, loaded from the store once however many ask, evicted by recency."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from adapters.normal_form import Delta


class HostCache:
    """Loads run on threads of their own, so a cold delta stalls no other row. Thread-safe.

    `load(digest)` reads one delta from the store; its errors reach whoever waits on the future and are not kept.
    """

    def __init__(self, load: Callable[[str], Delta], capacity_bytes: int, *, num_threads: int = 2) -> None:
        self._load = load
        self._capacity_bytes = capacity_bytes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="delta-load")
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Future[Delta]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def request(self, digest: str) -> Future[Delta]:
        """The delta, or the load of it that is under way: one load per digest at a time."""
        with self._lock:
            future = self._entries.get(digest)
            if future is None:
                future = self._entries[digest] = self._pool.submit(self._load, digest)
                fresh = True
            else:
                self._entries.move_to_end(digest)
                fresh = False
        if fresh:
            future.add_done_callback(lambda done: self._settle(digest, done))
        return future

    def _settle(self, digest: str, future: Future[Delta]) -> None:
        with self._lock:
            if future.cancelled() or future.exception() is not None:
                self._entries.pop(digest, None)
                return
            if self._entries.get(digest) is not future:
                return
            self._sizes[digest] = future.result().size_bytes
            while sum(self._sizes.values()) > self._capacity_bytes and len(self._sizes) > 1:
                oldest = next(key for key in self._entries if key in self._sizes)
                del self._entries[oldest], self._sizes[oldest]

    def drop(self, digest: str) -> None:
        """Forget `digest`; whoever holds the Delta keeps it."""
        with self._lock:
            self._entries.pop(digest, None)
            self._sizes.pop(digest, None)

    @property
    def used_bytes(self) -> int:
        """Bytes of the loaded deltas."""
        with self._lock:
            return sum(self._sizes.values())

    def close(self) -> None:
        """Stop the loader threads; loads under way are abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)
