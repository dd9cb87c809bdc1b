"""How a server's processes use their interpreter: when it collects garbage, and how long a thread keeps its lock."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""For so long a thread may keep the interpreter's lock while another waits; Python's own 5 ms add up."""


def settle() -> None:
    """Take all that is alive now out of the reach of garbage collections. Call it once, when everything is loaded.

    The libraries' 350,000 objects make a full collection hold the interpreter's lock for 0.35 s (measured on a busy
    core), during which every stream of the process stands still; afterwards it takes microseconds.
    """
    gc.collect()
    gc.freeze()


def take_turns() -> None:
    """Let the event loop have the lock soon while other threads read an upload. For gateways.

    A small request takes the lock a dozen times: beside an upload of 13,000 tensors it waited 98 ms for it in all, and
    waits 35 ms now (`python -m tests.hostile --beside-requests`).
    """
    sys.setswitchinterval(SWITCH_S)
