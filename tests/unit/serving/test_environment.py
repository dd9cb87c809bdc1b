"""What the processes of a server are started with."""

from __future__ import annotations

import pytest

from serving.config import Backbone, Engine, Settings
from serving.deployments.environment import kernel_environment


@pytest.mark.parametrize(("given", "replicas", "threads"), [(3, 2, "3"), (None, 2, "4"), (None, 99, "1")])
def test_a_replicas_kernel_threads_are_counted_and_sleep_soon(
    monkeypatch: pytest.MonkeyPatch, given: int | None, replicas: int, threads: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv(
        "GOMP_SPINCOUNT", "300000"
    )  # as some images have it: every step would wait for the spinning
    settings = Settings(backbone=Backbone(path="x"), engine=Engine(num_threads=given), replicas=replicas)
    assert kernel_environment(settings) == {
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "1000",
    }
