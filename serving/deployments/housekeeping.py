"""What a gateway does for the ledger beside requests: marks rows that dead gateways left open, removes old ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from adapters.errors import DeltamuxError
from serving.tenancy.ledger import Ledger

log = logging.getLogger("deltamux.housekeeping")

EVERY_S = 3600.0
DAY_S = 86_400.0


def keep_forever(
    ledger: Ledger,
    *,
    keep_days: float,
    abandoned_after_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Recover and purge at once, and again every EVERY_S seconds. `keep_days` 0: purge nothing."""
    while True:
        try:
            ledger.recover(older_than_s=abandoned_after_s)
            if keep_days:
                ledger.purge(older_than_s=keep_days * DAY_S)
        except DeltamuxError as error:  # the next turn does what this one did not
            log.warning("the ledger could not be kept: %s", error.message)
        sleep(EVERY_S)


def start_keeping(ledger: Ledger, *, keep_days: float, abandoned_after_s: float) -> None:
    """`keep_forever` on a daemon thread."""
    options = {"keep_days": keep_days, "abandoned_after_s": abandoned_after_s}
    threading.Thread(
        target=keep_forever, args=(ledger,), kwargs=options, name="housekeeping", daemon=True
    ).start()
