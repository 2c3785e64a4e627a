"""From texts to padded batches: encode, truncate, bucket by length, cut into micro-batches.

Importing this imports no torch: an ONNX file answers without.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_sentiment.console import make_bar
from lora_sentiment.data.cache import Part, keep_ids
from lora_sentiment.data.rows import Rows
from lora_sentiment.data.texts import hash_texts, release_pages

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

BUCKET_STEPS = 100
"""Optimizer steps whose rows are sorted together: enough to pad little, few enough to keep the order random."""
TOKENISE_ROWS = 1000
"""Texts that the tokenizer is given at once; its own threads share them, unless TOKENIZERS_PARALLELISM=false."""
CACHED_ROWS = 5000
"""Rows from which on token ids are kept on disk and mapped; fewer are tokenised again in no time."""
LAYOUT = 1
"""Part of the key of kept ids: raise it whenever other ids or lengths are made of the same texts, tokenizer and
settings (`tokenise`, `truncate`, `frame`, `_encode_parts`), or are written otherwise; else old ones are taken."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of many texts, compact: one flat array and where each row starts.

    Attributes:
        input_ids: All rows' ids one after another, [CLS] and [SEP] included, shape (num_tokens,).
        offsets: Row i is `input_ids[offsets[i]:offsets[i + 1]]`, shape (num_rows + 1,).
        labels: Shape (num_rows,).
        truncated: How many texts were longer than max_length.
        pad_token_id: Fills a batch's shorter rows.
        whole_lengths: Tokens of each text before it was truncated, [CLS] and [SEP] included, shape (num_rows,); None
            where that is not known.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated: int
    pad_token_id: int
    whole_lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape (num_rows,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch on a device.

    Attributes:
        input_ids: Shape (num_rows, longest).
        attention_mask: Ones over real tokens, same shape; None where no row is padded.
        labels: Shape (num_rows,).
        index: The rows' positions in their `Encoded`, shape (num_rows,).
        num_tokens: Real tokens, padding left out.
    """

    input_ids: "torch.Tensor"
    attention_mask: "torch.Tensor | None"
    labels: "torch.Tensor"
    index: NDArray[np.int64]
    num_tokens: int


@dataclass(frozen=True)
class TextEncoder:
    """From a text to what the model reads of it.

    Attributes:
        tokenizer: The base's tokenizer, which neither truncates nor pads.
        cls_token_id: First id of every input.
        sep_token_id: Last id of every input.
        pad_token_id: Fills a batch's shorter rows.
        max_length: Most tokens of an input, [CLS] and [SEP] included.
        truncation: `head` keeps the first tokens of a longer text; `head_tail` its first quarter and last three
            quarters (after Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?", section 5.3.1).
    """

    tokenizer: Tokenizer
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    max_length: int
    truncation: Literal["head", "head_tail"]

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        truncation: Literal["head", "head_tail"],
    ) -> "TextEncoder":
        """Return the encoder that a transformers tokenizer makes, whose last call's truncation and padding end."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        special = (
            int(tokenizer.cls_token_id),
            int(tokenizer.sep_token_id),
            int(tokenizer.pad_token_id),
        )
        return cls(backend, *special, max_length, truncation)

    @property
    def room(self) -> int:
        """Tokens of a text that one input holds."""
        return self.max_length - 2

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return every id of each text, without [CLS] and [SEP]."""
        return [
            found.ids
            for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]

    def truncate(self, ids: list[int]) -> list[int]:
        """Return the ids of a text that fit into one input."""
        if len(ids) <= self.room:
            return ids
        front = self.room if self.truncation == "head" else self.room // 4
        return ids[:front] + ids[len(ids) - (self.room - front) :]

    def windows(self, ids: list[int], *, stride: int) -> list[list[int]]:
        """Return a text's ids in windows that each fit into one input, neighbours sharing `stride` tokens.

        The last window ends with the text and so may share more.
        """
        step = self.room - stride
        last = max(0, len(ids) - self.room)
        starts = [*range(0, last, step), last]
        return [ids[start : start + self.room] for start in starts]

    def encode(self, rows: Rows, *, progress: bool = False) -> Encoded:
        """Return the truncated inputs of rows, with their labels, and a bar meanwhile if asked for.

        Those of many rows are kept on disk under a hash of texts, tokenizer and settings, and mapped.
        """
        kept = None
        if len(rows) >= CACHED_ROWS:
            kept = keep_ids(self._key(rows), lambda: self._encode_parts(rows, progress=progress))
        if kept is None:
            parts = list(self._encode_parts(rows, progress=progress))
            kept = (
                np.concatenate([ids for ids, _ in parts]),
                np.concatenate([whole for _, whole in parts]),
            )
        input_ids, whole = kept
        offsets = np.concatenate([[0], np.minimum(whole, self.max_length).cumsum()])
        truncated = int((whole > self.max_length).sum())
        return Encoded(input_ids, offsets, rows.labels, truncated, self.pad_token_id, whole)

    def _encode_parts(self, rows: Rows, *, progress: bool) -> Iterator[Part]:
        with make_bar(len(rows), desc="tokenising", unit="rows", show=progress) as bar:
            for start in range(0, len(rows), TOKENISE_ROWS):
                found = self.tokenise(rows.texts[start : start + TOKENISE_ROWS])
                ids = np.concatenate([self.frame(self.truncate(ids)) for ids in found])
                yield ids, np.array([len(ids) + 2 for ids in found], dtype=np.int64)
                bar.update(len(found))

    def _key(self, rows: Rows) -> str:
        """Return a hash (SHA-256) of all that decides the ids of rows, which their labels do not."""
        settings = [
            self.cls_token_id,
            self.sep_token_id,
            self.max_length,
            self.truncation,
            version("tokenizers"),
        ]
        digest = hashlib.sha256(json.dumps([LAYOUT, self.tokenizer.to_str(), *settings]).encode())
        return hash_texts(digest, rows.texts)

    def frame(self, ids: list[int]) -> NDArray[np.int32]:
        """Put [CLS] and [SEP] around the ids of one input."""
        return np.array([self.cls_token_id, *ids, self.sep_token_id], dtype=np.int32)

    def pack(
        self, inputs: Sequence[NDArray[np.int32]], *, labels: NDArray[np.int64] | None = None
    ) -> Encoded:
        """Lay framed inputs out one after another; without labels theirs are -1."""
        offsets = np.cumsum([0, *map(len, inputs)], dtype=np.int64)
        found = np.full(len(inputs), -1, dtype=np.int64) if labels is None else labels
        return Encoded(np.concatenate(inputs), offsets, found, 0, self.pad_token_id)


def plan_epoch(
    lengths: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the rows of each optimizer step of one epoch, every row once.

    Rows are shuffled, sorted by length within windows of BUCKET_STEPS steps, cut into steps, and the steps shuffled:
    the rows of a step are of like length, so little is padded, and no step is seen in order of length.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    steps: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * BUCKET_STEPS):
        window = order[start : start + batch_size * BUCKET_STEPS]
        window = window[np.argsort(lengths[window], kind="stable")]
        steps += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [steps[i] for i in generator.permutation(len(steps))]


def cut(
    index: NDArray[np.int64], lengths: NDArray[np.int64], *, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut rows into micro-batches of at most `max_tokens` padded tokens, longest first.

    A single row longer than that is a micro-batch of its own.
    """
    index = index[np.argsort(-lengths[index], kind="stable")]
    parts = []
    while len(index):
        fitting = max(1, max_tokens // int(lengths[index[0]]))
        parts.append(index[:fitting])
        index = index[fitting:]
    return parts


def shard(
    index: NDArray[np.int64], lengths: NDArray[np.int64], *, rank: int, num_processes: int
) -> NDArray[np.int64]:
    """Return one process's share of rows: dealt in order of length, so that all get like work."""
    return index[np.argsort(lengths[index], kind="stable")][rank::num_processes]


def take_rows(encoded: Encoded, index: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """Return the token ids of rows, as views; call `release_pages` on their base once they were copied."""
    starts = encoded.offsets[index].tolist()
    ends = encoded.offsets[index + 1].tolist()
    return [encoded.input_ids[start:end] for start, end in zip(starts, ends, strict=True)]


def pad(
    encoded: Encoded, index: NDArray[np.int64], *, to: Sequence[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Pad rows to the longest among them, or to the next of the lengths `to`, ascending.

    Returns:
        (input_ids, attention_mask), both (num_rows, longest); the mask is None where no row is padded.
    """
    lengths = encoded.lengths[index]
    longest = int(lengths.max())
    if to is not None:
        longest = next((length for length in to if length >= longest), longest)
    input_ids = np.full((len(index), longest), encoded.pad_token_id, dtype=np.int64)
    for row, i in enumerate(index):
        input_ids[row, : lengths[row]] = encoded.input_ids[
            encoded.offsets[i] : encoded.offsets[i + 1]
        ]
    release_pages(encoded.input_ids.base)
    mask = (
        (np.arange(longest) < lengths[:, None]).astype(np.int64)
        if lengths.min() < longest
        else None
    )
    return input_ids, mask


def make_batch(
    encoded: Encoded,
    index: NDArray[np.int64],
    *,
    device: "torch.device",
    lengths: Sequence[int] | None = None,
) -> Batch:
    """Pad rows to the longest among them, or to the next of `lengths`, and move them to a device."""
    import torch

    def move(values: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        # From other memory a copy to a GPU may wait for all that the GPU was given before.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(
            device, non_blocking=True
        )

    input_ids, mask = pad(encoded, index, to=lengths)
    return Batch(
        input_ids=move(input_ids),
        attention_mask=None if mask is None else move(mask),
        labels=move(encoded.labels[index]),
        index=index,
        num_tokens=int(encoded.lengths[index].sum()),
    )
