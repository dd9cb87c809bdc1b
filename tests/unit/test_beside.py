"""Hostile uploads beside small requests, in short: the loop never stands still for long, and the pulse sees why."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable

import pytest

from tests.hostile.beside import MAX_DELAY_S, TICK_S, Pulse, measure
from tests.hostile.worst import KINDS

COMPUTING_S = 0.25


def test_the_dearest_uploads_do_not_hold_up_the_loop() -> None:
    names = ["13,000 tensors", "60 MiB of NaN", "60 MiB, valid", "60 MiB of JSON", "400,000 parts"]
    assert set(names) <= set(KINDS)
    found = list(measure(names, good=lambda item: item.pause_s < MAX_DELAY_S, alone_s=0.05))
    assert [item.name for item in found] == names
    assert {item.name: item.pause_s for item in found if item.pause_s >= MAX_DELAY_S} == {}


def compute() -> None:
    """Keep the interpreter's lock, in pieces that end late, for so much time of this thread's on a processor."""
    until = time.thread_time() + COMPUTING_S
    while time.thread_time() < until:
        sum(range(3_000_000))


def hash_bytes() -> None:
    """Without the interpreter's lock."""
    until = time.thread_time() + COMPUTING_S
    while time.thread_time() < until:
        hashlib.sha256(bytes(1 << 20)).digest()


async def pause_beside(work: Callable[[], None], *, threaded: bool) -> float:
    pulse = Pulse()
    beating = asyncio.create_task(pulse.beat())
    await asyncio.sleep(5 * TICK_S)
    pulse.take()
    if threaded:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(TICK_S)
    else:
        work()
    await asyncio.sleep(5 * TICK_S)
    beating.cancel()
    return pulse.take()


@pytest.mark.parametrize("threaded", [False, True], ids=["on the loop", "with the interpreter's lock"])
async def test_the_pulse_sees_what_holds_up_the_loop(threaded: bool) -> None:
    least = (
        0.9 * COMPUTING_S if not threaded else 5 * TICK_S
    )  # a piece of the thread's is tens of milliseconds
    assert await pause_beside(compute, threaded=threaded) > least


async def test_the_pulse_does_not_see_work_beside_the_loop() -> None:
    pauses = [await pause_beside(hash_bytes, threaded=True) for _ in range(3)]
    assert min(pauses) < COMPUTING_S / 2
