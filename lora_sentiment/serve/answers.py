"""Answer requests: tokenise and queue the texts, and turn logits into labels and scores."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.classifier import EMPTY_TEXT, clean_parts, tokenise
from lora_sentiment.commands.explain import find_words, leave_each_out
from lora_sentiment.data.batches import TextEncoder, TokenIds
from lora_sentiment.data.texts import Text, split_text
from lora_sentiment.errors import ModelError
from lora_sentiment.serve.batching import Ids, Queue, call_in_thread
from lora_sentiment.serve.config import Limits
from lora_sentiment.serve.messages import (
    AnyRequest,
    AnyResponse,
    HfParameters,
    HfRequest,
    NoLabel,
    Prediction,
    PredictResponse,
    RefusalError,
    Score,
    Scores,
    TeiRequest,
    TextPair,
)
from lora_sentiment.serve.metrics import Metrics
from lora_sentiment.tasks.label_sets import find_set_thresholds, make_label_set
from lora_sentiment.tasks.scores import sigmoid, softmax
from lora_sentiment.tasks.task import get_temperature

if TYPE_CHECKING:
    # Imports torch, which makes the app slow to load.
    from lora_sentiment.serve.pool import LoadedAdapter, Pool

NUM_THREADS = 2
"""Threads that clean and tokenise."""
MAX_EXPLAINED_CHARACTERS = 2**21
"""Characters tokenised for the explanations of a request: each text once, and again without each of
its words."""
MAX_WAITING_CHARACTERS = 2**22
"""Characters that wait to be tokenised, over all requests. One request alone may have more."""
MAX_SHOWN_NAMES = 20
"""Most adapters that an error names."""
MAX_SHOWN_NAME = 100
"""Characters of an unknown adapter's name that an error shows."""


FUNCTIONS: Mapping[str, Callable[[NDArray[np.float32]], NDArray[np.floating]]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": lambda logits: logits,
}
"""Functions that turn logits into scores."""


@dataclass(frozen=True)
class TokenisedText:
    """One text as its adapter reads it.

    Attributes:
        inputs: Its token ids. With an explanation, then those of the text without its first word,
            its second, ...
        truncated: Whether it was cut.
        is_empty: Whether it has no token. It is computed like any other, but gets no label.
        words: Its words, or None without an explanation.
    """

    inputs: list[Ids]
    truncated: bool
    is_empty: bool
    words: list[str] | None


class Answerer:
    """Answers requests with the adapters of a pool."""

    def __init__(self, pool: "Pool", queue: Queue, *, limits: Limits, metrics: Metrics) -> None:
        self._pool = pool
        self._queue = queue
        self._limits = limits
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenise")
        self._waiting_characters = 0

    async def answer(self, request: AnyRequest) -> AnyResponse:
        """Answer a request of either form.

        Raises:
            RefusalError: As `Queue.ask`; for an adapter that is not loaded, or more than the limits
                allow.
        """
        if isinstance(request, TeiRequest):
            return await self._answer_tei(request)
        self._check_num_texts("texts", request.texts)
        adapter = choose_adapter(self._pool.adapters, request.adapter)
        given = read_texts("texts", adapter, request.texts)
        thresholds = None
        temperature = 1.0
        if request.coverage is not None:
            try:
                thresholds = find_set_thresholds(adapter.calibration, request.coverage)
            except ModelError as error:
                raise RefusalError("Validation", error.message) from error
            temperature = get_temperature(adapter.calibration) or 1.0
        texts = await self._tokenise(adapter, given, explain=request.explain)
        predictions: list[Prediction | NoLabel] = []
        for text, logits in zip(texts, await self._compute(adapter, texts), strict=True):
            if text.is_empty:
                predictions.append(NoLabel(error=EMPTY_TEXT))
                continue
            scores = adapter.task.compute_scores(logits, temperature=temperature)
            label_set = is_certain = None
            if thresholds is not None:
                label_set = make_label_set(scores[0], thresholds, adapter.labels)
                is_certain = len(label_set) == 1
            ranked = _rank(adapter.labels, scores[0])[: request.top_k]
            effects = None
            if text.words is not None:
                best = int(scores[0].argmax())
                effects = (scores[0, best] - scores[1:, best]).tolist()
            answer = adapter.task.make_answer(scores[0], adapter.labels, adapter.calibration)
            predictions.append(
                Prediction(
                    **answer,
                    label_set=label_set,
                    is_certain=is_certain,
                    top_k=ranked,
                    truncated=text.truncated,
                    words=text.words,
                    effects=effects,
                )
            )
        return PredictResponse(adapter=adapter.name, predictions=predictions)

    async def _answer_tei(self, request: TeiRequest) -> Scores | list[Scores]:
        """Answer one input, or a batch of inputs, with every label, best first."""
        rows = request.inputs if isinstance(request.inputs, list) else [request.inputs]
        direction = request.truncation_direction
        # A list of strings is one input, of one or two texts.
        inputs = rows if isinstance(rows[0], list) else [rows]
        answers = await self._score(
            [tuple(row) for row in inputs],
            request.adapter,
            function="none" if request.raw_scores else None,
            truncate=request.truncate,
            direction=direction and direction.lower(),
        )
        return answers if isinstance(rows[0], list) else answers[0]

    async def answer_hf(self, request: HfRequest, adapter: str | None) -> list[Scores]:
        """Answer each text with its most likely labels, best first.

        Raises:
            RefusalError: As `answer`.
        """
        parameters = request.parameters or HfParameters()
        return await self._score(
            request.inputs if isinstance(request.inputs, list) else [request.inputs],
            adapter,
            function=parameters.function_to_apply,
            top_k=parameters.top_k,
        )

    async def _score(
        self,
        inputs: Sequence[str | TextPair | tuple[str, ...]],
        name: str | None,
        *,
        function: str | None,
        top_k: int | None = None,
        truncate: bool | None = None,
        direction: str | None = None,
    ) -> list[Scores]:
        self._check_num_texts("inputs", inputs)
        adapter = choose_adapter(self._pool.adapters, name)
        given = read_texts("inputs", adapter, inputs)
        texts = await self._tokenise(adapter, given, truncate=truncate, direction=direction)
        compute_scores = FUNCTIONS[function] if function else adapter.task.compute_scores
        answers: list[Scores] = []
        for text, logits in zip(texts, await self._compute(adapter, texts), strict=True):
            if text.is_empty:
                answers.append([NoLabel(error=EMPTY_TEXT)])
                continue
            (scores,) = compute_scores(logits)
            answers.append(_rank(adapter.labels, scores)[:top_k])
        return answers

    def shut_down(self) -> None:
        """End the threads without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_num_texts(self, key: str, texts: Sequence[object]) -> None:
        most = self._limits.max_texts
        if len(texts) > most:
            raise RefusalError(
                "TooLarge", f"{key}: found {len(texts):,}; allowed: at most {most:,} in a request"
            )

    async def _tokenise(
        self,
        adapter: "LoadedAdapter",
        texts: Sequence[Text],
        *,
        explain: bool = False,
        truncate: bool | None = None,
        direction: str | None = None,
    ) -> list[TokenisedText]:
        """Tokenise texts in a thread. The characters that wait for a thread are bounded.

        Raises:
            RefusalError: `Overloaded` if too many characters wait already; as `tokenise_texts`.
        """
        # Each text has at least two tokens. A request that cannot be queued is not tokenised.
        self._queue.check(2 * len(texts))
        limits = self._limits
        num_characters = sum(map(_count_characters, texts))
        if explain:
            most = num_characters * (1 + limits.max_explained_words)
            num_characters = min(most, MAX_EXPLAINED_CHARACTERS)
        waiting = self._waiting_characters
        if waiting and waiting + num_characters > MAX_WAITING_CHARACTERS:
            raise RefusalError(
                "Overloaded",
                f"{waiting:,} characters wait to be tokenised already; allowed: "
                f"{MAX_WAITING_CHARACTERS:,}; try again later",
                headers={"Retry-After": str(self._queue.estimate_wait())},
            )
        work = partial(
            tokenise_texts,
            adapter,
            texts,
            max_words=limits.max_explained_words if explain else None,
            truncate=limits.on_long == "truncate" if truncate is None else truncate,
            direction=direction,
        )
        self._waiting_characters += num_characters
        try:
            # If this is cancelled, work that has not begun never does.
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, call_in_thread, work)
        finally:
            self._waiting_characters -= num_characters

    async def _compute(
        self, adapter: "LoadedAdapter", texts: Sequence[TokenisedText]
    ) -> list[NDArray[np.float32]]:
        """Return the logits of each text's inputs, of shape (num_inputs, num_labels)."""
        inputs = [ids for text in texts for ids in text.inputs]
        logits = iter(await self._queue.ask(adapter, inputs))
        num_truncated = sum(text.truncated for text in texts)
        self._metrics.count_answer(adapter.name, texts=len(texts), truncated=num_truncated)
        return [np.stack(list(islice(logits, len(text.inputs)))) for text in texts]


def choose_adapter(adapters: Mapping[str, "LoadedAdapter"], name: str | None) -> "LoadedAdapter":
    """Return the adapter of a name. Without a name, return the only adapter.

    Raises:
        RefusalError: If no such adapter is loaded, or the request must name one.
    """
    if not adapters:
        raise RefusalError("Unhealthy", "no adapter is loaded")
    if name is None and len(adapters) == 1:
        return next(iter(adapters.values()))
    if name is not None and name in adapters:
        return adapters[name]
    names = ", ".join(sorted(adapters)[:MAX_SHOWN_NAMES])
    more = len(adapters) - MAX_SHOWN_NAMES
    if more > 0:
        names += f" and {more:,} more; see GET /adapters"
    if name is None:
        raise RefusalError(
            "Validation",
            "adapter: is missing, but several are loaded; name one (at / and /info in the address: "
            f"?adapter=NAME); allowed: {names}",
        )
    raise RefusalError(
        "NotFound", f"adapter: {name[:MAX_SHOWN_NAME]!r} is not loaded; allowed: {names}"
    )


def read_texts(
    key: str, adapter: "LoadedAdapter", inputs: Sequence[str | TextPair | tuple[str, ...]]
) -> list[Text]:
    """Return the texts of a request, pairs as tuples.

    Args:
        key: The request's key, for messages.
        adapter: The adapter that answers.
        inputs: A text as a string or as a tuple of one; a pair as a tuple of two.

    Raises:
        RefusalError: If one is a text for an adapter that reads pairs, or the other way round.
    """
    texts: list[Text] = []
    for place, given in enumerate(inputs):
        parts = (given,) if isinstance(given, str) else given
        if isinstance(parts, TextPair):
            parts = (parts.text, parts.text_pair)
        is_pair = len(parts) == 2
        if is_pair != adapter.encoder.reads_pairs:
            found, allowed = "a pair of texts", "single texts"
            if not is_pair:
                found, allowed = "a single text", 'pairs {"text": "..", "text_pair": ".."}'
            raise RefusalError(
                "Validation",
                f"{key}[{place}]: found {found}; the adapter {adapter.name!r} reads {allowed}",
            )
        texts.append((parts[0], parts[1]) if is_pair else parts[0])
    return texts


def tokenise_texts(
    adapter: "LoadedAdapter",
    texts: Sequence[Text],
    *,
    max_words: int | None = None,
    truncate: bool = True,
    direction: str | None = None,
) -> list[TokenisedText]:
    """Clean, tokenise, truncate and frame texts as `Classifier.probabilities` does.

    Texts are cleaned here, because the words of an explanation are those of the cleaned text.

    Args:
        adapter: The adapter that reads the texts.
        texts: The texts.
        max_words: Make the inputs of explanations, for texts of at most so many words; None makes
            none.
        truncate: Whether a longer text is cut or refused.
        direction: `right` keeps the first tokens of a longer text, `left` the last; None cuts as in
            training.

    Raises:
        RefusalError: For a text that is too long to be explained, or to be answered without
            truncation.
    """
    encoder = adapter.encoder
    tokenised = []
    num_characters = 0
    for place, text in enumerate(texts):
        if adapter.clean:
            text = clean_parts(text)
        words = None
        variants = [text]
        if max_words is not None:
            words = find_words(text)
            num_characters += _count_characters(text) * (1 + len(words))
            _check_explained(place, len(words), max_words, num_characters)
            variants += leave_each_out(text)
        token_ids = list(tokenise(encoder, variants, clean=False))
        num_tokens = encoder.count(token_ids[0]) + encoder.num_special
        truncated = num_tokens > encoder.max_length
        if truncated and not truncate:
            raise RefusalError(
                "TooLarge",
                f"texts[{place}]: has {num_tokens:,} tokens; the adapter reads "
                f"{encoder.max_length:,}",
            )
        tokenised.append(
            TokenisedText(
                inputs=[encoder.frame(_truncate(encoder, ids, direction)) for ids in token_ids],
                truncated=truncated,
                is_empty=encoder.is_empty(token_ids[0]),
                words=words,
            )
        )
    return tokenised


def _check_explained(place: int, num_words: int, max_words: int, num_characters: int) -> None:
    """Refuse an explanation that would take too long."""
    if num_words > max_words:
        raise RefusalError(
            "TooLarge",
            f"texts[{place}]: has {num_words:,} words; an explanation takes at most {max_words:,}",
        )
    if num_characters > MAX_EXPLAINED_CHARACTERS:
        raise RefusalError(
            "TooLarge",
            f"texts: each text is read again without each of its words, here {num_characters:,} "
            f"characters or more; allowed: {MAX_EXPLAINED_CHARACTERS:,}; send fewer or shorter "
            "texts",
        )


def _truncate(encoder: TextEncoder, ids: TokenIds, direction: str | None) -> TokenIds:
    if direction is None:
        return encoder.truncate(ids)
    keeps_first = replace(encoder, truncation="head")
    if direction == "right":
        return keeps_first.truncate(ids)
    return _reverse(keeps_first.truncate(_reverse(ids)))


def _reverse(ids: TokenIds) -> TokenIds:
    return ids[::-1] if isinstance(ids, list) else (ids[0][::-1], ids[1][::-1])


def _count_characters(text: Text) -> int:
    return sum(map(len, split_text(text)))


def _rank(labels: Sequence[str], scores: NDArray[np.floating]) -> list[Score]:
    """Return all labels with their scores, best first."""
    order = np.argsort(-scores, kind="stable")
    return [Score(label=labels[i], score=float(scores[i])) for i in order]
