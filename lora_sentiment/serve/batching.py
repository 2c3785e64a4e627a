"""One queue for all adapters, batched by tokens and by time, computed in one thread."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import Encoded
from lora_sentiment.serve.config import Limits
from lora_sentiment.serve.messages import RefusalError
from lora_sentiment.serve.metrics import Metrics

if TYPE_CHECKING:
    # Imports torch, which makes the app slow to load.
    from lora_sentiment.serve.pool import LoadedAdapter

log = logging.getLogger("lora_sentiment")

MAX_RETRY_SECONDS = 60
STOPPED = "the server stopped before it answered this request"
Ids = NDArray[np.int32]
Logits = NDArray[np.float32]
Result = TypeVar("Result")
Compute = Callable[[Sequence["LoadedAdapter"], Encoded], list[Logits]]


def call_in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread. Python 3.11 cannot pass on a StopIteration: the waiter hangs."""
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError(f"{function.__qualname__} raised StopIteration") from error


@dataclass(eq=False)
class PendingRequest:
    """The texts of one request.

    Batches are computed one after another in the order of the queue, so logits come in the order of
    the texts.

    Attributes:
        adapter: The adapter that answers.
        inputs: Token ids of each text.
        answer: Completed with the logits of all texts, or with an error.
        since: Time of the loop at which the request was queued.
        num_waiting_tokens: Number of tokens that are not in a batch yet.
        num_batched: Number of texts that are in a batch.
        logits: Logits of the texts that are computed.
    """

    adapter: "LoadedAdapter"
    inputs: Sequence[Ids]
    answer: "asyncio.Future[list[Logits]]"
    since: float
    num_waiting_tokens: int
    num_batched: int = 0
    logits: list[Logits] = field(default_factory=list)

    def fail(self, message: str, kind: Literal["Backend", "Unhealthy"] = "Backend") -> None:
        """Refuse the request, if it is not answered yet."""
        if not self.answer.done():
            self.answer.set_exception(RefusalError(kind, message))


Batch = list[tuple[PendingRequest, Ids]]


class Queue:
    """A queue of requests, bounded in tokens: first in, first out.

    `run` must be running in the event loop of the requests.

    Attributes:
        closed: Whether new requests are refused. Requests whose texts are being tokenised are still
            queued.
        abandoned: Whether all requests are refused.
    """

    def __init__(self, compute: Compute, *, limits: Limits, metrics: Metrics) -> None:
        self.closed = self.abandoned = False
        self._compute = compute
        self._limits = limits
        self._metrics = metrics
        self._waiting: dict[PendingRequest, None] = {}
        self._computing: Batch = []
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._seconds_per_token: float | None = None
        metrics.queued_tokens.set_function(lambda: self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that wait."""
        return sum(request.num_waiting_tokens for request in self._waiting)

    def check(self, num_tokens: int) -> None:
        """Refuse a new request that cannot be queued now.

        Raises:
            RefusalError: `Unhealthy` while the server stops, `TooLarge` if the request never fits,
                `Overloaded` if it does not fit now.
        """
        if self.closed:
            raise RefusalError("Unhealthy", "the server is stopping and takes no new requests")
        self._check_room(num_tokens)

    def estimate_wait(self) -> int:
        """Estimate the seconds for the waiting tokens, from 1 to MAX_RETRY_SECONDS."""
        seconds = self.num_tokens * (self._seconds_per_token or 0.0)
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(seconds)))

    async def ask(self, adapter: "LoadedAdapter", inputs: Sequence[Ids]) -> list[Logits]:
        """Return the logits of each input, of shape (num_labels,).

        If the caller is cancelled, texts that are not in a batch yet leave the queue.

        Raises:
            RefusalError: As `check`, except that a stopping server still queues the request;
                `Backend` if its batch cannot be computed.
        """
        num_tokens = sum(map(len, inputs))
        self._check_room(num_tokens)
        loop = asyncio.get_running_loop()
        request = PendingRequest(adapter, inputs, loop.create_future(), loop.time(), num_tokens)
        self._waiting[request] = None
        self._changed.set()
        try:
            return await request.answer
        finally:
            self._waiting.pop(request, None)

    def call_first(self, function: Callable[[], None]) -> None:
        """Call a function in the compute thread and wait for it. Use this before `run`."""
        self._thread.submit(call_in_thread, function).result()

    async def run(self) -> None:
        """Compute batch after batch until cancelled. However it ends, nobody waits any longer."""
        try:
            while True:
                await self._wait_for_batch()
                self._computing = self._take_batch()
                if self._computing:
                    await self._compute_batch(self._computing)
                    self._computing = []
        finally:
            self.abandon()

    def close(self) -> None:
        """Refuse new requests. Queued ones are still computed."""
        self.closed = True
        self._changed.set()

    def abandon(self) -> None:
        """Refuse all requests: those that wait, those that are computed, and new ones."""
        self.abandoned = True
        computing = [request for request, _ in self._computing]
        for request in [*self._waiting, *computing]:
            request.fail(STOPPED, "Unhealthy")

    def shut_down(self) -> None:
        """End the thread without waiting for its batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, num_tokens: int) -> None:
        most = self._limits.max_queue_tokens
        if self.abandoned:
            raise RefusalError("Unhealthy", STOPPED)
        if num_tokens > most:
            raise RefusalError(
                "TooLarge",
                f"the request has {num_tokens:,} tokens; allowed: {most:,}; send it in parts",
            )
        if self.num_tokens + num_tokens > most:
            raise RefusalError(
                "Overloaded",
                f"{self.num_tokens:,} tokens wait already and this request has at least "
                f"{num_tokens:,}; allowed: {most:,} together; try again later",
                headers={"Retry-After": str(self.estimate_wait())},
            )

    async def _wait_for_batch(self) -> None:
        """Wait for a text, then until a batch is full or the first text has waited long enough."""
        while not self._waiting:
            await self._wait_for_change()
        oldest = next(iter(self._waiting))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(oldest.since + self._limits.batch_wait_ms / 1000):
                while not self.closed and self.num_tokens < self._limits.batch_tokens:
                    await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _take_batch(self) -> Batch:
        """Take whole texts out of the queue: at least one, and at most `batch_tokens` tokens."""
        batch: Batch = []
        room = self._limits.batch_tokens
        for request in list(self._waiting):
            # An earlier batch of this request failed, or nobody waits for it any more.
            if request.answer.done():
                del self._waiting[request]
                continue
            for ids in request.inputs[request.num_batched :]:
                if batch and len(ids) > room:
                    return batch
                batch.append((request, ids))
                room -= len(ids)
                request.num_batched += 1
                request.num_waiting_tokens -= len(ids)
            del self._waiting[request]
        return batch

    async def _compute_batch(self, batch: Batch) -> None:
        """Compute a batch in the thread and answer its requests.

        A batch that fails is computed again adapter by adapter, so that only the faulty adapter's
        requests fail.
        """
        started = time.perf_counter()
        computed = asyncio.get_running_loop().run_in_executor(
            self._thread, call_in_thread, self._compute_logits, batch
        )
        # `wait` does not raise. The exception is logged and answered, and the next batch is
        # computed.
        await asyncio.wait([computed])
        seconds = time.perf_counter() - started
        error = computed.exception()
        parts: dict[LoadedAdapter, Batch] = {}
        for request, ids in batch:
            parts.setdefault(request.adapter, []).append((request, ids))
        if error and len(parts) > 1:
            log.warning(
                "a batch of %d texts for %d adapters could not be computed (%s); each adapter is "
                "computed alone",
                len(batch),
                len(parts),
                type(error).__name__,
            )
            for part in parts.values():
                await self._compute_batch(part)
            return
        num_tokens = sum(len(ids) for _, ids in batch)
        self._metrics.count_batch(
            texts=len(batch), tokens=num_tokens, seconds=seconds, failed=bool(error)
        )
        if error:
            log.error("a batch of %d texts could not be computed", len(batch), exc_info=error)
            for request, _ in batch:
                request.fail("the model could not be computed; see the server's log")
            return
        speed = seconds / num_tokens
        if self._seconds_per_token is not None:
            speed = 0.8 * self._seconds_per_token + 0.2 * speed
        self._seconds_per_token = speed
        _answer_requests(batch, computed.result())

    def _compute_logits(self, batch: Batch) -> list[Logits]:
        adapters = [request.adapter for request, _ in batch]
        # All adapters share one base and one tokenizer, so any encoder packs for all.
        encoded = adapters[0].encoder.pack([ids for _, ids in batch])
        logits = self._compute(adapters, encoded)
        if len(logits) != len(batch):
            raise RuntimeError(f"{len(logits)} answers for {len(batch)} texts")
        return logits


def _answer_requests(batch: Batch, logits: list[Logits]) -> None:
    for (request, _), row in zip(batch, logits, strict=True):
        if not np.isfinite(row).all():
            log.error("%r: computed a value that is not finite", request.adapter.name)
            request.fail("the adapter computed a value that is not finite")
        request.logits.append(row)
        if len(request.logits) == len(request.inputs) and not request.answer.done():
            request.answer.set_result(request.logits)
