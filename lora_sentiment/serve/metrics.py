"""What the server counts, for Prometheus: numbers and names of adapters, never text."""

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counts of one app, in a registry of its own, so that several apps may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "lora_sentiment_requests",
            "Answered requests.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "lora_sentiment_predict_seconds",
            "Seconds from a prediction's header to its answer, whatever it was.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._texts = Counter(
            "lora_sentiment_texts", "Texts answered.", ["adapter"], registry=self.registry
        )
        self._named: set[str] = set()
        self._truncated = Counter(
            "lora_sentiment_truncated_texts", "Texts that were cut.", registry=self.registry
        )
        self.abandoned = Counter(
            "lora_sentiment_abandoned_requests",
            "Predictions whose client went away first.",
            registry=self.registry,
        )
        self.faults = Counter(
            "lora_sentiment_faults", "Requests that met a fault of ours.", registry=self.registry
        )
        self.queued_tokens = Gauge(
            "lora_sentiment_queued_tokens", "Tokens that wait.", registry=self.registry
        )
        self.under_way = Gauge(
            "lora_sentiment_requests_under_way", "Predictions under way.", registry=self.registry
        )
        self.adapters = Gauge(
            "lora_sentiment_adapters", "Adapters that are loaded.", registry=self.registry
        )
        self._batch_texts = Histogram(
            "lora_sentiment_batch_texts", "Texts of a batch, words left out for an explanation among them.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "lora_sentiment_batch_seconds",
            "Seconds to compute a batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter("lora_sentiment_tokens", "Tokens computed.", registry=self.registry)
        self._failed = Counter(
            "lora_sentiment_failed_batches",
            "Batches that could not be computed.",
            registry=self.registry,
        )

    def count_batch(self, *, texts: int, tokens: int, seconds: float, failed: bool) -> None:
        """Count one batch."""
        self._batch_texts.observe(texts)
        self._batch_seconds.observe(seconds)
        self._tokens.inc(tokens)
        self._failed.inc(failed)

    def count_answer(self, adapter: str, *, texts: int, truncated: int) -> None:
        """Count the texts of one answered request."""
        self._named.add(adapter)
        self._texts.labels(adapter).inc(texts)
        self._truncated.inc(truncated)

    def keep(self, served: Collection[str]) -> None:
        """Drop the counts of adapters that are not loaded any more: names would pile up where they come and go."""
        for name in self._named - set(served):
            self._texts.remove(name)
        self._named &= set(served)
        self.adapters.set(len(served))

    def show(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
