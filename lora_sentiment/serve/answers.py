"""From texts to answers: which adapter, how it reads the texts, their place in the line, labels with probabilities."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.commands.explain import find_words, leave_each_out
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.cleaning import clean_text
from lora_sentiment.serve.batching import STOPPED, Ids, Queue, work_in_thread
from lora_sentiment.serve.config import Limits
from lora_sentiment.serve.messages import (
    Prediction,
    PredictRequest,
    PredictResponse,
    RefusalError,
    Score,
    TeiRequest,
)
from lora_sentiment.serve.metrics import Metrics
from lora_sentiment.tasks.single_label import softmax

if TYPE_CHECKING:
    from lora_sentiment.serve.pool import Pool, Served

READERS = 2
"""Threads that clean and tokenise."""
CHUNK_CHARACTERS = 2**16
"""Characters tokenised before a thread looks whether anybody still waits for them."""
NAMED = 20
"""Most adapters that an error names."""


@dataclass(frozen=True)
class _Way:
    """How texts are read.

    Attributes:
        explain: Whether each is read again without each of its words.
        refuse_long: Whether a text that would be cut is refused.
        direction: `Right` keeps the first tokens of a longer text, `Left` its last; None cuts it as in training.
    """

    explain: bool
    refuse_long: bool
    direction: str | None = None


@dataclass(frozen=True)
class _Reading:
    """One text as its adapter reads it.

    Attributes:
        inputs: Its token ids; with an explanation also those of the text without its first word, its second, ...
        truncated: Whether it was cut.
        words: What stands between its blanks; None where no explanation was asked for.
    """

    inputs: list[Ids]
    truncated: bool
    words: list[str] | None


class Answerer:
    """Answers requests with the adapters of a pool."""

    def __init__(self, pool: "Pool", queue: Queue, *, limits: Limits, metrics: Metrics) -> None:
        self._pool, self._queue, self._limits, self._metrics = pool, queue, limits, metrics
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._reading, self._lock = 0, threading.Lock()

    async def predict(self, asked: PredictRequest) -> PredictResponse:
        """Answer texts.

        Raises:
            RefusalError: As `Queue.ask`; for an adapter that is not loaded, and for more than the limits allow.
        """
        served = choose(self._pool.served, asked.adapter)
        way = _Way(asked.explain, refuse_long=self._limits.on_long == "refuse")
        readings = await self._read(served, asked.texts, way)
        logits = await self._ask(served, readings)
        predictions = [
            _predict(served.labels, own, softmax(found), top_k=asked.top_k)
            for own, found in zip(readings, logits, strict=True)
        ]
        return PredictResponse(adapter=served.name, predictions=predictions)

    async def predict_as_tei(self, asked: TeiRequest) -> list[Score] | list[list[Score]]:
        """Answer one input, or a batch of them, with every label, best first.

        Raises:
            RefusalError: As `predict`.
        """
        served = choose(self._pool.served, asked.adapter)
        rows = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        texts = [row[0] if isinstance(row, list) else row for row in rows]
        truncate = self._limits.on_long == "truncate" if asked.truncate is None else asked.truncate
        direction = asked.truncation_direction and asked.truncation_direction.capitalize()
        readings = await self._read(
            served, texts, _Way(explain=False, refuse_long=not truncate, direction=direction)
        )
        logits = await self._ask(served, readings)
        scores = [
            _rank(served.labels, (found if asked.raw_scores else softmax(found))[0])
            for found in logits
        ]
        return scores if isinstance(rows[0], list) else scores[0]

    def shut(self) -> None:
        """End the threads; what they read is not waited for."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, served: "Served", texts: Sequence[str], way: _Way) -> list[_Reading]:
        """Read texts in a thread; what waits for one is bounded in characters."""
        limits = self._limits
        _check_sizes(texts, way, limits)
        # What cannot be taken anyway is not read first.
        self._queue.check(2 * len(texts))
        again = limits.max_explained_words
        size = sum(map(len, texts))
        if way.explain:
            size = min(
                sum(len(text) * (1 + min(again, len(text))) for text in texts),
                limits.max_reread_characters,
            )
        if self._reading and self._reading + size > limits.max_reading_characters:
            raise RefusalError(
                "Overloaded",
                f"{self._reading:,} characters wait to be read already; allowed: {limits.max_reading_characters:,}; "
                "try again later",
                retry_after=self._queue.retry_after(),
            )
        given_up = threading.Event()
        self._count(size)

        def unwanted() -> bool:
            return given_up.is_set() or self._queue.abandoned

        work = self._readers.submit(
            work_in_thread, read_texts, served, texts, way, limits, unwanted
        )
        # Not when nobody waits any more: the thread still reads then, until it looks.
        work.add_done_callback(lambda _: self._count(-size))
        try:
            return await asyncio.wrap_future(work)
        finally:
            given_up.set()

    def _count(self, characters: int) -> None:
        with self._lock:
            self._reading += characters

    async def _ask(
        self, served: "Served", readings: Sequence[_Reading]
    ) -> list[NDArray[np.float32]]:
        """Return the logits of each reading: (num_inputs, num_labels)."""
        rows = await self._queue.ask(served, [ids for own in readings for ids in own.inputs])
        self._metrics.count_answer(
            served.name, texts=len(readings), truncated=sum(own.truncated for own in readings)
        )
        ends = np.cumsum([len(own.inputs) for own in readings])
        return np.split(np.stack(rows), ends[:-1])


def choose(served: Mapping[str, "Served"], name: str | None) -> "Served":
    """Return the adapter of a name, or the only one where none is named.

    Raises:
        RefusalError: If it is not loaded, or it must be named.
    """
    if not served:
        raise RefusalError("Unhealthy", "no adapter is loaded")
    if name is None:
        if len(served) == 1:
            return next(iter(served.values()))
        raise RefusalError(
            "Validation", f"adapter: is missing, and several are loaded: {_names(served)}"
        )
    if name not in served:
        raise RefusalError(
            "NotFound", f"adapter: {name[:100]!r} is not loaded; there is {_names(served)}"
        )
    return served[name]


def read_texts(
    served: "Served", texts: Sequence[str], way: _Way, limits: Limits, stopped: Callable[[], bool]
) -> list[_Reading]:
    """Clean, tokenise, cut and frame texts, as `Classifier.probabilities` does.

    Raises:
        RefusalError: For more to explain than allowed, a text too long where it must not be cut, and as soon as
            `stopped` says that nobody waits for the answer.
    """
    read = [
        clean_text(text, Counter()) if served.clean else text
        for text in _while_wanted(texts, stopped)
    ]
    words = [find_words(text) if way.explain else [] for text in read]
    _check_words(read, words, limits)
    asked = (
        variant
        for text, own in zip(read, words, strict=True)
        for variant in (text, *leave_each_out(text, own))
    )
    found = _tokenise(served.encoder, _while_wanted(asked, stopped))
    readings = []
    for place, own in enumerate(words):
        ids = [next(found) for _ in (None, *own)]
        truncated = len(ids[0]) > served.encoder.room
        if truncated and way.refuse_long:
            raise RefusalError(
                "TooLarge",
                f"texts[{place}]: has {len(ids[0]) + 2:,} tokens; the adapter reads {served.encoder.max_length:,}",
            )
        inputs = [served.encoder.frame(_cut(served.encoder, row, way.direction)) for row in ids]
        readings.append(
            _Reading(
                inputs, truncated, [word.group() for word in words[place]] if way.explain else None
            )
        )
    return readings


def _while_wanted(texts: Iterable[str], stopped: Callable[[], bool]) -> Iterator[str]:
    for text in texts:
        if stopped():
            raise RefusalError("Unhealthy", STOPPED)
        yield text


def _tokenise(encoder: TextEncoder, texts: Iterable[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, tokenised some at a time."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield from encoder.tokenise(some)
            some, size = [], 0
    yield from encoder.tokenise(some)


def _check_words(texts: Sequence[str], words: Sequence[Sequence[object]], limits: Limits) -> None:
    """Refuse what would be read too long: a text is read again for each of its words."""
    for place, own in enumerate(words):
        if len(own) > limits.max_explained_words:
            raise RefusalError(
                "TooLarge",
                f"texts[{place}]: has {len(own):,} words; an explanation takes at most {limits.max_explained_words:,}",
            )
    size = sum(len(text) * (1 + len(own)) for text, own in zip(texts, words, strict=True) if own)
    if size > limits.max_reread_characters:
        raise RefusalError(
            "TooLarge",
            f"texts: {size:,} characters would be read, each text again without each of its words; an explanation "
            f"takes at most {limits.max_reread_characters:,}; send fewer or shorter texts",
        )


def _cut(encoder: TextEncoder, ids: list[int], direction: str | None) -> list[int]:
    if direction is None:
        return encoder.truncate(ids)
    return ids[: encoder.room] if direction == "Right" else ids[max(0, len(ids) - encoder.room) :]


def _check_sizes(texts: Sequence[str], way: _Way, limits: Limits) -> None:
    """Refuse more to explain than allowed; how many texts a request may have was checked as it was read."""
    if not way.explain:
        return
    if len(texts) > limits.max_explained_texts:
        raise RefusalError(
            "TooLarge",
            f"texts: found {len(texts):,}; allowed: at most {limits.max_explained_texts:,} a request that asks for "
            "explanations",
        )
    longest = max(map(len, texts))
    if longest > limits.max_explained_characters:
        raise RefusalError(
            "TooLarge",
            f"texts: found one of {longest:,} characters; an explanation takes at most "
            f"{limits.max_explained_characters:,}",
        )


def _predict(
    labels: Sequence[str], reading: _Reading, scores: NDArray[np.float64], *, top_k: int
) -> Prediction:
    """Make the answer for one text of the probabilities of its inputs: (num_inputs, num_labels)."""
    ranked = _rank(labels, scores[0])[:top_k]
    best = int(scores[0].argmax())
    return Prediction(
        label=ranked[0].label,
        score=ranked[0].score,
        top_k=ranked,
        truncated=reading.truncated,
        words=reading.words,
        effects=None if reading.words is None else (scores[0, best] - scores[1:, best]).tolist(),
    )


def _rank(labels: Sequence[str], scores: NDArray[np.floating]) -> list[Score]:
    order = np.argsort(-scores, kind="stable")
    return [Score(label=labels[i], score=float(scores[i])) for i in order]


def _names(served: Mapping[str, "Served"]) -> str:
    names = sorted(served)
    more = f" and {len(names) - NAMED:,} more; see GET /adapters" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
