"""Collection as a gateway runs it: again and again, on a thread that ends with the process."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from adapters.collector import Collector
from adapters.errors import DeltamuxError
from serving.metrics import GatewayMetrics

log = logging.getLogger("deltamux.collection")


def collect_forever(
    collector: Collector,
    metrics: GatewayMetrics,
    every_s: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Collect about every `every_s` seconds. The first time comes early at random, so that gateways spread out."""
    sleep(every_s * random.random())  # noqa: S311
    while True:
        try:
            metrics.blobs_collected.inc(collector.collect().swept)
        except DeltamuxError as error:  # the next run goes on where this one stopped
            log.warning("a collection failed: %s", error.message)
            metrics.collection_failures.inc()
        sleep(every_s)


def start_collecting(collector: Collector, metrics: GatewayMetrics, every_s: float) -> None:
    """`collect_forever` on a daemon thread; not at all where `every_s` is 0."""
    if every_s:
        run = threading.Thread(target=collect_forever, args=(collector, metrics, every_s), daemon=True)
        run.name = "collection"
        run.start()
