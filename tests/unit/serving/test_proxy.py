"""What stands before Serve: long bodies pass at a pace, short ones as they come."""

from __future__ import annotations

import time

import pytest

from serving.deployments import proxy

CHUNK = 64 << 10


@pytest.mark.parametrize(("num_bytes", "at_least_s"), [(1 << 20, 0.0), (11 << 20, 10 / 32)])
async def test_a_long_body_is_let_through_at_a_pace(num_bytes: int, at_least_s: float) -> None:
    left = num_bytes // CHUNK

    async def receive() -> dict[str, object]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x" * CHUNK, "more_body": left > 0}

    receive_slowly = proxy.paced(receive)  # type: ignore[arg-type]
    started, got = time.monotonic(), 0
    while (message := await receive_slowly())["more_body"]:
        got += len(message["body"])
    took = time.monotonic() - started
    assert got + len(message["body"]) == num_bytes
    assert took >= at_least_s * 0.9
    if not at_least_s:
        assert took < 10 / 32
