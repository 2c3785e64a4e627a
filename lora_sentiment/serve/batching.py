"""One line for all adapters: texts wait, are batched by tokens and a few milliseconds, and one thread computes them."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import Encoded
from lora_sentiment.serve.config import Limits
from lora_sentiment.serve.messages import RefusalError
from lora_sentiment.serve.metrics import Metrics

if TYPE_CHECKING:
    from lora_sentiment.serve.pool import Served

log = logging.getLogger("lora_sentiment")

MAX_RETRY_SECONDS = 60
STOPPED = "the server stopped before it answered this request"
Ids = NDArray[np.int32]
Logits = NDArray[np.float32]
Result = TypeVar("Result")
Compute = Callable[[Sequence["Served"], Encoded], list[Logits]]


def work_in_thread(work: Callable[..., Result], *given: Any) -> Result:
    """Call something in a thread; a StopIteration would never reach the coroutine that waits for it."""
    try:
        return work(*given)
    except StopIteration as error:
        raise RuntimeError(f"{work.__qualname__} met an iterator that ended early") from error


@dataclass(eq=False)
class _Asked:
    """One request's texts: how many of them went into a batch, and what was found for those that came back.

    Batches are computed one after another in the order of the line, so answers come in the order of the texts.
    """

    served: "Served"
    inputs: Sequence[Ids]
    answer: "asyncio.Future[list[Logits]]"
    since: float
    taken: int = 0
    found: list[Logits] = field(default_factory=list)

    @property
    def waiting_tokens(self) -> int:
        return sum(map(len, self.inputs[self.taken :]))


class Queue:
    """First in, first out; bounded in tokens. `run` must be running, in the event loop that asks.

    Attributes:
        tokens: How many wait.
        closed: Whether nothing new is taken; what is being read already still is.
        abandoned: Whether all that waits is refused.
    """

    def __init__(self, compute: Compute, *, limits: Limits, metrics: Metrics) -> None:
        self.tokens = 0
        self.closed = self.abandoned = False
        self._compute, self._limits, self._metrics = compute, limits, metrics
        self._line: OrderedDict[_Asked, None] = OrderedDict()
        self._computing: list[tuple[_Asked, Ids]] = []
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._seconds_per_token: float | None = None

    def check(self, tokens: int) -> None:
        """Refuse a new request that cannot be taken now.

        Raises:
            RefusalError: `Unhealthy` while stopping, `TooLarge` for more than ever fits, `Overloaded` for what does not
                fit now.
        """
        if self.closed:
            raise RefusalError("Unhealthy", "the server is stopping; it takes nothing new")
        self._check_room(tokens)

    def retry_after(self) -> int:
        """Estimate from the speed seen how many seconds what waits will take: 1 to MAX_RETRY_SECONDS."""
        seconds = self.tokens * (self._seconds_per_token or 0.0)
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(seconds)))

    async def ask(self, served: "Served", inputs: Sequence[Ids]) -> list[Logits]:
        """Wait for the logits of some inputs, one array of (num_labels,) each.

        Cancelling it takes out of the line what was not computed yet.

        Raises:
            RefusalError: As `check`, but for a stop that came after it; `Backend` if its batch could not be computed.
        """
        tokens = sum(map(len, inputs))
        self._check_room(tokens)
        loop = asyncio.get_running_loop()
        asked = _Asked(served, inputs, loop.create_future(), loop.time())
        self._line[asked] = None
        self._count(tokens)
        self._some.set()
        try:
            return await asked.answer
        finally:
            self._forget(asked)

    def work_first(self, work: Callable[[], None]) -> None:
        """Run a function in the compute thread and wait for it. Call this before `run`."""
        self._thread.submit(work_in_thread, work).result()

    async def run(self) -> None:
        """Compute what comes, batch by batch, until cancelled."""
        while True:
            await self._wait_for_batch()
            self._computing = self._take()
            if self._computing:
                await self._answer(self._computing)
                self._computing = []

    def close(self) -> None:
        """Take nothing new; what waits is still computed."""
        self.closed = True
        self._enough.set()

    def abandon(self) -> None:
        """Refuse all that waits or is computed, and whatever else comes."""
        self.abandoned = True
        for asked in [*self._line, *(asked for asked, _ in self._computing)]:
            self._fail(asked, RefusalError("Unhealthy", STOPPED))

    def shut(self) -> None:
        """End the thread; a batch that it computes is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, tokens: int) -> None:
        most = self._limits.max_queue_tokens
        if self.abandoned:
            raise RefusalError("Unhealthy", STOPPED)
        if tokens > most:
            raise RefusalError(
                "TooLarge",
                f"the request makes {tokens:,} tokens; allowed: {most:,}; send it in parts",
            )
        if self.tokens + tokens > most:
            raise RefusalError(
                "Overloaded",
                f"{self.tokens:,} tokens wait already and this request makes at least {tokens:,}; allowed: {most:,} "
                "together; try again later",
                retry_after=self.retry_after(),
            )

    async def _wait_for_batch(self) -> None:
        """Wait for a first text, then for as many tokens as a batch holds or until the first text waited enough."""
        while not self._line:
            self._some.clear()
            await self._some.wait()
        first = next(iter(self._line)).since
        left = first + self._limits.batch_wait_ms / 1000 - asyncio.get_running_loop().time()
        if left > 0 and not self.closed and self.tokens < self._limits.batch_tokens:
            self._enough.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._enough.wait()

    def _take(self) -> list[tuple[_Asked, Ids]]:
        """Take the next batch out of the line: whole texts up to `batch_tokens`, at least one."""
        batch: list[tuple[_Asked, Ids]] = []
        tokens = 0
        while self._line:
            asked = next(iter(self._line))
            for ids in asked.inputs[asked.taken :]:
                if batch and tokens + len(ids) > self._limits.batch_tokens:
                    self._count(-tokens)
                    return batch
                batch.append((asked, ids))
                asked.taken += 1
                tokens += len(ids)
            del self._line[asked]
        self._count(-tokens)
        return batch

    async def _answer(self, batch: list[tuple[_Asked, Ids]]) -> None:
        """Compute one batch in the thread and give each request its part; a fault is that of one adapter alone."""
        loop = asyncio.get_running_loop()
        tokens = sum(len(ids) for _, ids in batch)
        started = time.perf_counter()
        computed = loop.run_in_executor(self._thread, work_in_thread, self._compute_rows, batch)
        # Not awaited itself: what it raised is looked at, logged and answered, and the next batch is computed.
        await asyncio.wait([computed])
        seconds = time.perf_counter() - started
        error = computed.exception()
        if error and len(apart := _take_apart(batch)) > 1:
            # Whose fault it is shows alone; the others are answered.
            said = "a batch of %d texts for %d adapters could not be computed (%s); now each adapter's alone"
            log.warning(said, len(batch), len(apart), type(error).__name__)
            for own in apart:
                await self._answer(own)
            return
        self._metrics.count_batch(
            texts=len(batch), tokens=tokens, seconds=seconds, failed=bool(error)
        )
        if error:
            log.error("a batch of %d texts could not be computed", len(batch), exc_info=error)
            for asked, _ in batch:
                self._fail(
                    asked,
                    RefusalError("Backend", "the model could not be computed; the log says why"),
                )
            return
        before = self._seconds_per_token
        self._seconds_per_token = (
            seconds / tokens if before is None else 0.8 * before + 0.2 * seconds / tokens
        )
        for (asked, _), logits in zip(batch, computed.result(), strict=True):
            if not np.isfinite(logits).all():
                log.error("%r: answered a value that is not finite", asked.served.name)
                self._fail(
                    asked,
                    RefusalError("Backend", "the adapter answered a value that is not finite"),
                )
            asked.found.append(logits)
            if len(asked.found) == len(asked.inputs) and not asked.answer.done():
                asked.answer.set_result(asked.found)

    def _compute_rows(self, batch: list[tuple[_Asked, Ids]]) -> list[Logits]:
        served = [asked.served for asked, _ in batch]
        # One base, so one tokenizer: any adapter's encoder packs for all.
        found = self._compute(served, served[0].encoder.pack([ids for _, ids in batch]))
        if len(found) != len(batch):
            raise RuntimeError(f"{len(batch)} texts were asked and {len(found)} answered")
        return found

    def _fail(self, asked: _Asked, error: RefusalError) -> None:
        if not asked.answer.done():
            asked.answer.set_exception(error)
        self._forget(asked)

    def _forget(self, asked: _Asked) -> None:
        if asked in self._line:
            del self._line[asked]
            self._count(-asked.waiting_tokens)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self._metrics.queued_tokens.set(self.tokens)
        if self.tokens >= self._limits.batch_tokens:
            self._enough.set()


def _take_apart(batch: list[tuple[_Asked, Ids]]) -> list[list[tuple[_Asked, Ids]]]:
    """Return the parts of a batch by adapter."""
    parts: dict[int, list[tuple[_Asked, Ids]]] = {}
    for asked, ids in batch:
        parts.setdefault(id(asked.served), []).append((asked, ids))
    return list(parts.values())
