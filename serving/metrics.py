"""Every Prometheus metric of gateway and engine, declared once, on a registry that the caller owns.

A replica's registry crosses a process border as `MetricFamily` values (`families`); the gateway puts its own
and the replicas' on one page (`render`). `docs/metrics.md` lists all of them; a test keeps both in step.

Names: `deltamux_` for ours, `vllm:` for the gauges that inference gateways read (Gateway API Inference
Extension, llm-d). Label values are bounded sets: no tenant, no delta, no model reference from a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.core import MetricFamily, Sample

_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0)
_BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
_LOAD_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class GatewayMetrics:
    """What the HTTP side counts. `registry` is the one given, for the `/metrics` page."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "deltamux_requests_total",
            "HTTP requests answered, by route template and status; 499: the caller went away first.",
            ("route", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "deltamux_request_seconds",
            "Time from a request's first byte to the last byte of its answer.",
            ("route",),
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "deltamux_requests_in_flight", "HTTP requests being answered now.", registry=registry
        )
        self.time_to_first_token_seconds = Histogram(
            "deltamux_time_to_first_token_seconds",
            "Time from a call's start to its first generated token, per choice, beam searches aside.",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.inter_token_seconds = Histogram(
            "deltamux_inter_token_seconds",
            "Time between generated tokens, per choice; tokens that come together share their wait.",
            buckets=_BETWEEN_TOKENS_S,
            registry=registry,
        )
        self.uploads = Counter(
            "deltamux_uploads_total",
            "Delta uploads by outcome: ready, client_gone, or what the caller got (an error code or http_<status>).",
            ("outcome",),
            registry=registry,
        )
        self.uploads_open = Gauge("deltamux_uploads_open", "Delta uploads in progress.", registry=registry)
        self.usage_requests = Counter(
            "deltamux_usage_requests_total",
            "Requests closed in the ledger, by outcome (completed, cancelled, failed; crashed: by a gateway before).",
            ("outcome",),
            registry=registry,
        )
        self.usage_tokens = Counter(
            "deltamux_usage_tokens_total",
            "Tokens of the requests closed in the ledger: prompt, cached (part of prompt) and completion.",
            ("kind",),
            registry=registry,
        )
        self.scrape_failures = Counter(
            "deltamux_scrape_failures_total",
            "Reads of /metrics that lack the replicas' part, since no replica answered.",
            registry=registry,
        )
        self.blobs_collected = Counter(
            "deltamux_blobs_collected_total",
            "Deltas whose bytes a collection has removed from the store.",
            registry=registry,
        )
        self.collection_failures = Counter(
            "deltamux_collection_failures_total",
            "Collections that the database or the store has broken off.",
            registry=registry,
        )

    def count_usage(self, outcome: str, tokens: Mapping[str, int]) -> None:
        """Count one request that the ledger has closed."""
        self.usage_requests.labels(outcome=outcome).inc()
        for kind, number in tokens.items():
            self.usage_tokens.labels(kind=kind).inc(number)


class EngineMetrics:
    """What one replica's engine counts. `registry` is the one given, for `families`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests_waiting = Gauge(
            "vllm:num_requests_waiting", "Requests admitted and not yet in the batch.", registry=registry
        )
        self.requests_running = Gauge(
            "vllm:num_requests_running", "Requests in the batch.", registry=registry
        )
        self.kv_usage = Gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", registry=registry
        )
        self.requests_finished = Counter(
            "deltamux_requests_finished_total",
            "Requests that left the engine, by finish reason (stop, length, cancelled, error).",
            ("reason",),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "deltamux_prompt_tokens_total", "Prompt tokens of the requests that ran.", registry=registry
        )
        self.generated_tokens = Counter(
            "deltamux_generated_tokens_total", "Tokens generated.", registry=registry
        )
        self.prefix_hits = Counter(
            "deltamux_prefix_cache_hits_total",
            "Requests whose prompt began like one that was computed before.",
            registry=registry,
        )
        self.prefix_tokens = Counter(
            "deltamux_prefix_cache_tokens_total",
            "Prompt tokens that were not computed, since the prefix cache held them.",
            registry=registry,
        )
        self.preemptions = Counter(
            "deltamux_preemptions_total",
            "Times that a running request gave up its place, to be computed again later.",
            registry=registry,
        )
        self.step_seconds = Histogram(
            "deltamux_step_seconds",
            "Duration of one engine step: schedule, run, sample.",
            buckets=_STEP_S,
            registry=registry,
        )
        self.adapters_resident = Gauge(
            "deltamux_adapters_resident", "Deltas in device memory.", registry=registry
        )
        self.adapter_bytes = Gauge(
            "deltamux_adapter_bytes", "Bytes of the deltas in device memory.", registry=registry
        )
        self.merged_bytes = Gauge(
            "deltamux_merged_bytes",
            "Bytes of weights with a delta merged in, beside the base's.",
            registry=registry,
        )
        self.adapter_loads = Counter(
            "deltamux_adapter_loads_total", "Deltas placed in device memory.", registry=registry
        )
        self.adapter_evictions = Counter(
            "deltamux_adapter_evictions_total",
            "Deltas that left device memory to make room.",
            registry=registry,
        )
        self.adapter_load_seconds = Histogram(
            "deltamux_adapter_load_seconds",
            "Time to place one delta in device memory.",
            buckets=_LOAD_S,
            registry=registry,
        )


def families(registry: CollectorRegistry) -> tuple[MetricFamily, ...]:
    """Everything that `registry` holds now, as values that cross a process border.

    Without the `_created` series that prometheus_client adds to each counter and histogram: nobody reads them.
    """
    return tuple(
        MetricFamily(
            name=metric.name,
            documentation=metric.documentation,
            type=metric.type,
            samples=tuple(
                Sample(name=s.name, labels=dict(s.labels), value=s.value)
                for s in metric.samples
                if not s.name.endswith("_created")
            ),
        )
        for metric in registry.collect()
    )


def render(scraped: Iterable[tuple[Mapping[str, str], Iterable[MetricFamily]]]) -> bytes:
    """One Prometheus text page of all `scraped` families, each sample with its source's labels added.

    Families of one name from several sources become one, as the format demands; the sources' labels must tell
    their samples apart.
    """
    merged: dict[str, Metric] = {}
    for labels, found in scraped:
        for family in found:
            metric = merged.get(family.name)
            if metric is None:
                metric = merged[family.name] = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                metric.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
    return generate_latest(_Page(tuple(merged.values())))


@dataclass(frozen=True, slots=True)
class _Page(Collector):
    """Finished metrics where prometheus_client expects something to collect from."""

    metrics: tuple[Metric, ...]

    def collect(self) -> Iterator[Metric]:
        return iter(self.metrics)
