"""Metrics for Prometheus: numbers and names of adapters, never text."""

from collections.abc import Collection, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "lora_sentiment"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of one app, with a registry of their own: a process may have several apps."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Answered requests.", ["route", "status"])
        self.seconds = self._histogram(
            "predict_seconds", "Seconds from a prediction's header to its answer.", SECONDS
        )
        self.abandoned = self._counter(
            "abandoned_requests", "Predictions whose client disconnected first."
        )
        self.faults = self._counter("faults", "Requests that met a fault of the server.")
        self.queued_tokens = self._gauge("queued_tokens", "Tokens that wait.")
        self.in_progress = self._gauge("requests_under_way", "Predictions in progress.")
        self._adapters = self._gauge("adapters", "Loaded adapters.")
        self._texts = self._counter("texts", "Answered texts.", ["adapter"])
        self._truncated = self._counter("truncated_texts", "Texts that were cut.")
        self._batch_texts = self._histogram(
            "batch_texts", "Texts of a batch, including variants for explanations.", BATCH_TEXTS
        )
        self._batch_seconds = self._histogram(
            "batch_seconds", "Seconds to compute a batch.", SECONDS
        )
        self._tokens = self._counter("tokens", "Computed tokens.")
        self._failed = self._counter("failed_batches", "Batches that could not be computed.")
        self._counted_adapters: set[str] = set()

    def count_batch(self, *, texts: int, tokens: int, seconds: float, failed: bool) -> None:
        """Count one batch."""
        self._batch_texts.observe(texts)
        self._batch_seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._failed.inc(failed)

    def count_answer(self, adapter: str, *, texts: int, truncated: int) -> None:
        """Count the texts of one answered request."""
        self._counted_adapters.add(adapter)
        self._texts.labels(adapter).inc(texts)
        self._truncated.inc(truncated)

    def set_adapters(self, loaded: Collection[str]) -> None:
        """Set the loaded adapters, and drop the counts of others: their names would pile up."""
        for name in self._counted_adapters.difference(loaded):
            self._texts.remove(name)
        self._counted_adapters.intersection_update(loaded)
        self._adapters.set(len(loaded))

    def show(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, namespace=PREFIX, buckets=buckets, registry=self.registry)
