"""A pool without a model: each adapter answers by a formula, so that any mix-up of texts or adapters shows."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from lora_sentiment.classifier import Classifier
from lora_sentiment.data.batches import Encoded, PairTemplate, TextEncoder
from lora_sentiment.models.engine import Engine
from lora_sentiment.serve.config import Limits, ServeConfig
from lora_sentiment.serve.run import Server, bind
from lora_sentiment.tasks import SINGLE_LABEL, Task

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "good",
    "bad",
    "film",
    "a",
    "the",
    *(f"w{i}" for i in range(100)),
]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True, eq=False)
class FakeAdapter:
    name: str
    labels: tuple[str, ...]
    encoder: TextEncoder
    factor: float = 1.0
    clean: bool = True
    sha256: str = "0" * 64
    form: str = "low-rank"
    num_parameters: int = 10
    method: str = "lora"
    task: Task = SINGLE_LABEL
    calibration: dict | None = None


def make_adapter(
    name: str, labels: Sequence[str] = ("no", "yes"), *, max_length: int = 16, **values: Any
) -> FakeAdapter:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # [CLS] A [SEP] B [SEP], without types.
    template = PairTemplate((2,), (3,), (3,), 0) if values.pop("reads_pairs", False) else None
    truncation = values.pop("truncation", "head")
    encoder = TextEncoder(tokenizer, 2, 3, 0, max_length, truncation, template=template)
    return FakeAdapter(name, tuple(labels), encoder, **values)


def answer(adapter: FakeAdapter, ids: Sequence[int]) -> np.ndarray:
    """Logits of one text by one adapter."""
    return np.array(
        [np.cos(adapter.factor * (label + 1) * sum(i * (place + 1) for place, i in enumerate(ids))) * 3 for label, _ in
         enumerate(adapter.labels)], dtype=np.float32,
    )  # fmt: skip


def make_classifier(served: FakeAdapter) -> Classifier:
    """A classifier that answers as one adapter of the pool."""

    def engine(input_ids, mask):
        lengths = np.full(len(input_ids), input_ids.shape[1]) if mask is None else mask.sum(1)
        return np.stack(
            [answer(served, row[:n].tolist()) for row, n in zip(input_ids, lengths, strict=True)]
        )

    own = (served.labels, served.encoder, Engine(engine, 1024), served.clean)
    return Classifier(*own, served.calibration, "", task=served.task)


class FakePool:
    """What `Pool` shows, over `answer`.

    Attributes:
        gate: `compute` waits for it; clear it to keep what is asked in the line.
        begun: Set as soon as `compute` is called.
        fault: Raised by the next `compute`, once.
        batches: How many texts each `compute` was given.
        warmed: What `warm_up` was given, or None before it.
    """

    base, base_sha256, dtype = "fake", "1" * 64, "float32"

    def __init__(self, *adapters: FakeAdapter) -> None:
        self.adapters = {adapter.name: adapter for adapter in adapters}
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.fault: BaseException | None = None
        self.batches: list[int] = []
        self.warmed: int | None = None

    def refresh(self, is_stopped: Callable[[], bool]) -> None:
        pass

    def warm_up(self, *, batch_tokens: int) -> None:
        self.warmed = batch_tokens

    def compute(self, adapters: Sequence[FakeAdapter], encoded: Encoded) -> list[np.ndarray]:
        self.begun.set()
        self.gate.wait(20)
        self.batches.append(len(adapters))
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        rows = np.split(encoded.input_ids, encoded.offsets[1:-1])
        return [answer(own, ids.tolist()) for own, ids in zip(adapters, rows, strict=True)]


@contextmanager
def running(pool: Any, **limits: Any) -> Iterator[Server]:
    """A server on a free port of loopback, in a thread of this process, that watches; stopped at the end."""
    config = ServeConfig(watch=Path("x"), port=0, limits=Limits(**limits))
    said: SimpleQueue[str] = SimpleQueue()
    server = Server(pool, config, bind(config), announce=said.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert said.get(timeout=20) == server.address
        yield server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
