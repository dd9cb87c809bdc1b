"""The metrics: declared on the caller's registry, documented, and carried across processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import EngineMetrics, GatewayMetrics, families, render

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
CLASSES = (GatewayMetrics, EngineMetrics)


def declared(kind: type[GatewayMetrics] | type[EngineMetrics]) -> list[MetricWrapperBase]:
    return [item for item in vars(kind(CollectorRegistry())).values() if isinstance(item, MetricWrapperBase)]


def row(metric: MetricWrapperBase) -> str:
    """The line of the table that documents one metric."""
    (family,) = metric.collect()
    name = family.name + "_total" * (family.type == "counter")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "-"
    return f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


def test_every_metric_is_documented_and_nothing_else() -> None:
    documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert documented == [row(metric) for kind in CLASSES for metric in declared(kind)]


def test_names_of_both_sides_differ_so_that_one_page_can_hold_them() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    EngineMetrics(registry)  # prometheus_client refuses a name that is taken
    assert len(families(registry)) == sum(len(declared(kind)) for kind in CLASSES)


def test_nothing_is_declared_globally() -> None:
    names = {family.name for family in REGISTRY.collect()}
    assert not any(name.startswith(("deltamux", "vllm")) for name in names)


def test_gateways_of_the_ecosystem_find_their_gauges() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.requests_waiting.set(3)
    metrics.requests_running.set(2)
    metrics.kv_usage.set(0.5)
    text = render([({"model_name": "tiny"}, families(registry))]).decode()
    for name, value in (
        ("num_requests_waiting", 3),
        ("num_requests_running", 2),
        ("kv_cache_usage_perc", 0.5),
    ):
        assert f'\nvllm:{name}{{model_name="tiny"}} {float(value)}\n' in text


def test_families_survive_the_journey() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry)
    metrics.requests_finished.labels(reason="stop").inc(4)
    metrics.step_seconds.observe(0.003)
    metrics.step_seconds.observe(9.0)
    pages = [render([({"replica": name}, families(registry)) for name in names]) for names in ("a", "ab")]
    alone, both = (
        {family.name: family for family in text_string_to_metric_families(page.decode())} for page in pages
    )
    assert alone.keys() == both.keys()
    assert not any(name.endswith("_created") for name in both)
    finished = [s for s in both["deltamux_requests_finished"].samples if s.name.endswith("_total")]
    assert {(s.labels["replica"], s.labels["reason"]): s.value for s in finished} == {
        ("a", "stop"): 4.0,
        ("b", "stop"): 4.0,
    }
    steps = {(s.name, s.labels.get("le")): s.value for s in alone["deltamux_step_seconds"].samples}
    assert steps["deltamux_step_seconds_bucket", "0.005"] == 1.0
    assert steps["deltamux_step_seconds_bucket", "+Inf"] == 2.0
    assert steps["deltamux_step_seconds_count", None] == 2.0


@pytest.mark.parametrize("value", ['a"b', "a\nb", "a\\b", "é"])
def test_label_values_are_escaped(value: str) -> None:
    registry = CollectorRegistry()
    EngineMetrics(registry)
    page = render([({"replica": value}, families(registry))])
    samples = [s for family in text_string_to_metric_families(page.decode()) for s in family.samples]
    assert samples
    assert {s.labels["replica"] for s in samples} == {value}


def test_labels_are_bounded_sets() -> None:
    labels = {label for kind in CLASSES for metric in declared(kind) for label in metric._labelnames}
    assert labels == {"route", "status", "outcome", "reason", "kind"}
