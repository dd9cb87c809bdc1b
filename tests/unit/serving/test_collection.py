"""A gateway's collections: again and again, through every failure."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from adapters.collector import Collected
from adapters.errors import RegistryUnavailable, StoreError
from serving.deployments.collection import collect_forever
from serving.metrics import GatewayMetrics


class Scripted:
    """A collector whose runs end as scripted; a KeyboardInterrupt ends the test."""

    def __init__(self, *outcomes: Collected | BaseException) -> None:
        self.outcomes = list(outcomes)

    def collect(self) -> Collected:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def test_goes_on_after_failures_and_counts() -> None:
    metrics, pauses = GatewayMetrics(CollectorRegistry()), []
    script = Scripted(
        Collected(3, 2), StoreError("x"), RegistryUnavailable("y"), Collected(0, 5), KeyboardInterrupt()
    )
    with pytest.raises(KeyboardInterrupt):
        collect_forever(script, metrics, 60.0, sleep=pauses.append)  # type: ignore[arg-type]
    assert 0 <= pauses[0] <= 60
    assert pauses[1:] == [60.0] * 4
    value = metrics.registry.get_sample_value
    assert value("deltamux_blobs_collected_total") == 7
    assert value("deltamux_collection_failures_total") == 2
