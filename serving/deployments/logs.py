"""Where a replica's log lines go: into the file that Serve keeps for it."""

from __future__ import annotations

import logging

SERVE_LOGGER = "ray.serve"


def write_to_serves_file() -> None:
    """Have every logger of this process write to the file of its replica.

    Call it in a deployment's constructor. Serve gives a handler to its own logger alone, and passes what others print
    to stderr on as INFO, which the servers' level, WARNING, then drops: without this our errors leave no trace.
    """
    for handler in logging.getLogger(SERVE_LOGGER).handlers:
        logging.getLogger().addHandler(handler)
