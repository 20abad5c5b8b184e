"""What a server tells Prometheus, in a registry of its own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chai_jax.serve.job import Status
from chai_jax.server.choices import Choice

# What is told of the engine: the field of its status, the name in front of which `chai_jax_` is put, and what it is.
GAUGES = (
    ("running", "requests_running", "requests that have a slot"),
    ("queued", "requests_queued", "requests that wait for a slot"),
    ("slots", "slots", "sequences that fit the cache as it is stored now"),
    ("dense_slots", "dense_slots", "sequences that would fit as the dense model's bfloat16"),
    ("context", "context_tokens", "tokens of a sequence, at most"),
    ("bytes_per_token", "cache_bytes_per_token", "bytes of the cache that a token takes"),
    ("kv_bytes", "cache_bytes", "bytes of the cache as it is allocated now"),
    ("kv_limit", "cache_limit_bytes", "bytes that the cache may take"),
)
COUNTERS = (
    ("read", "prompt_tokens", "tokens of prompts"),
    ("made", "generated_tokens", "tokens that were generated"),
    ("looked_up", "prefix_lookup_tokens", "tokens of prompts that were looked for among kept prefixes"),
    ("reused", "prefix_reused_tokens", "tokens of prompts that were found there"),
)
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _OfEngine(Collector):
    def __init__(self, status: Callable[[], Status]):
        self._status = status

    def collect(self) -> Iterator[Metric]:
        now = self._status()
        for field, name, words in GAUGES:
            yield GaugeMetricFamily(f"chai_jax_{name}", words, getattr(now, field))
        for field, name, words in COUNTERS:
            yield CounterMetricFamily(f"chai_jax_{name}", words, getattr(now, field))
        stored = GaugeMetricFamily("chai_jax_cache_format", "1 for what the cache is stored as now", labels=["format"])
        stored.add_metric([now.format], 1)
        yield stored


class Metrics:
    """Counters of one server; `status` is its engine's."""

    def __init__(self, status: Callable[[], Status]):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(status))
        ours = self._registry
        self._requests = Counter("chai_jax_http_requests", "requests that are over", ["route", "status"], registry=ours)
        self._first = Histogram(
            "chai_jax_time_to_first_token_seconds",
            "from a request to a text's first token",
            buckets=FIRST,
            registry=ours,
        )
        self._each = Histogram(
            "chai_jax_time_per_token_seconds",
            "a text's mean time of a token after its first",
            buckets=EACH,
            registry=ours,
        )

    def answered(self, route: str, status: int) -> None:
        """A request is over; a stream that broke off counts as the error that it ended with."""
        self._requests.labels(route, str(status)).inc()

    def ended(self, choice: Choice) -> None:
        """A text is over, or given up."""
        if choice.first is not None:
            self._first.observe(choice.first - choice.began)
            if choice.made > 1:
                self._each.observe((choice.last - choice.first) / (choice.made - 1))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
