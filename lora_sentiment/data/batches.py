"""Turn texts into token ids and padded micro-batches: tokenise, truncate, bucket by length, cut.

Importing this module does not import torch: a classifier saved as ONNX answers without torch.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_sentiment.console import make_bar
from lora_sentiment.data.cache import Part, keep_ids
from lora_sentiment.data.rows import Rows
from lora_sentiment.data.texts import Text, hash_texts, release_pages
from lora_sentiment.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

BUCKET_STEPS = 100
"""Optimizer steps whose rows are sorted by length together.

More steps need less padding; fewer keep the order more random.
"""
TOKENISE_ROWS = 1000
"""Texts per call of the tokenizer.

Its threads share them, unless TOKENIZERS_PARALLELISM=false.
"""
CACHED_ROWS = 5000
"""From this number of rows on, token ids are kept on disk. Fewer rows are tokenised again."""
COUNTED_IDS = 1_000_000
"""Token ids that are counted at a time, which bounds the memory."""
LAYOUT = 1
"""Part of the hash of kept ids.

Raise it whenever the same texts, tokenizer and settings give other ids or lengths, or another file
format. Otherwise old ids are used.
"""
SECOND_TYPE = 1 << 30
"""Added to the id of each token of type 1, where the base knows types of tokens. So one array holds
both, on disk, in a batch and on its way to a GPU. `split_types` takes them apart."""
Ids = TypeVar("Ids", NDArray[np.int64], "torch.Tensor")
TokenIds = list[int] | tuple[list[int], list[int]]
"""The ids of a text, or of the two texts of a pair, without special tokens."""


def split_types(input_ids: Ids) -> tuple[Ids, Ids]:
    """Return the token ids and the token types of ids that hold both, of the same shape."""
    return input_ids % SECOND_TYPE, input_ids // SECOND_TYPE


@dataclass(frozen=True)
class Encoded:
    """Token ids of many texts in one flat array.

    Attributes:
        input_ids: All rows one after another, special tokens included, shape (num_tokens,).
        offsets: Row i is `input_ids[offsets[i]:offsets[i + 1]]`, shape (num_rows + 1,).
        labels: Label of each row, as its task has them, first axis num_rows.
        truncated: Number of texts longer than max_length.
        pad_token_id: Fills the shorter rows of a batch.
        whole_lengths: Tokens of each text before truncation, special tokens included, shape
            (num_rows,). None if unknown.
        unk_token_id: Stands for characters that the tokenizer does not know. None if it knows all.
        num_special: Special tokens of a row.
        has_types: Whether ids of type 1 have SECOND_TYPE added.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[Any]
    truncated: int
    pad_token_id: int
    whole_lengths: NDArray[np.int64] | None = None
    unk_token_id: int | None = None
    num_special: int = 2
    has_types: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, shape (num_rows,)."""
        return np.diff(self.offsets)

    @cached_property
    def num_unknown(self) -> int:
        """Number of tokens that are unk_token_id."""
        num_unknown = 0
        if self.unk_token_id is None:
            return num_unknown
        for start in range(0, len(self.input_ids), COUNTED_IDS):
            part = self.input_ids[start : start + COUNTED_IDS] % SECOND_TYPE
            num_unknown += int(np.count_nonzero(part == self.unk_token_id))
            release_pages(self.input_ids.base)
        return num_unknown


@dataclass(frozen=True)
class Batch:
    """One padded micro-batch on a device.

    Attributes:
        input_ids: Shape (num_rows, longest).
        attention_mask: 1 for tokens and 0 for padding, same shape. None if no row is padded.
        token_type_ids: 1 for the tokens of type 1, same shape. None if all types are 0.
        labels: As in `Encoded`.
        index: Positions of the rows in their `Encoded`, shape (num_rows,).
        num_tokens: Tokens without padding.
    """

    input_ids: "torch.Tensor"
    attention_mask: "torch.Tensor | None"
    token_type_ids: "torch.Tensor | None"
    labels: "torch.Tensor"
    index: NDArray[np.int64]
    num_tokens: int


@dataclass(frozen=True)
class PairTemplate:
    """What a tokenizer puts around the two texts of a pair. Ids have their types added.

    Attributes:
        start: Ids before the first text.
        between: Ids between the two.
        end: Ids after the second text.
        second_type: SECOND_TYPE if the second text's tokens are of type 1, else 0.
    """

    start: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    second_type: int

    @property
    def num_special(self) -> int:
        """Special tokens of a pair."""
        return len(self.start) + len(self.between) + len(self.end)

    def fill(self, first: list[int], second: list[int]) -> list[int]:
        """Return the ids of a pair."""
        typed = [token + self.second_type for token in second]
        return [*self.start, *first, *self.between, *typed, *self.end]


def read_template(tokenizer: Tokenizer, *, has_types: bool) -> PairTemplate:
    """Read how a tokenizer joins two texts.

    Args:
        tokenizer: The tokenizer, without truncation and padding.
        has_types: Whether the model knows types of tokens.

    Raises:
        ModelError: The tokenizer puts nothing before, between or after the texts.
    """
    encoding = tokenizer.encode("a", "a")
    parts: dict[str, list[int]] = {"start": [], "between": [], "end": []}
    place, second_type = "start", 0
    for token, kind, owner in zip(
        encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
    ):
        added = SECOND_TYPE * kind if has_types else 0
        if owner == 0:
            place = "between"
        elif owner == 1:
            place, second_type = "end", added
        else:
            parts[place].append(token + added)
    if not all(parts.values()):
        raise ModelError(
            "the base's tokenizer has no template that joins a pair of texts; choose another base, "
            "or join the texts in the data and leave out data.text_pair_column",
            key="model.name",
        )
    start, between, end = (tuple(ids) for ids in parts.values())
    return PairTemplate(start, between, end, second_type)


@dataclass(frozen=True)
class TextEncoder:
    """Turns texts into the token ids that the model reads.

    Attributes:
        tokenizer: The tokenizer of the base, without truncation and padding.
        cls_token_id: First id of every input.
        sep_token_id: Last id of every input.
        pad_token_id: Fills the shorter rows of a batch.
        max_length: Most tokens of an input, [CLS] and [SEP] included.
        truncation: `head` keeps the first tokens of a longer text. `head_tail` keeps its first
            quarter and last three quarters (after Sun et al. 2019, "How to Fine-Tune BERT for Text
            Classification?", section 5.3.1).
        unk_token_id: Stands for characters that the tokenizer does not know. None if it knows all,
            or nobody counts them.
        template: Joins pairs of texts. None means that an input is a single text.
    """

    tokenizer: Tokenizer
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    max_length: int
    truncation: Literal["head", "head_tail"]
    unk_token_id: int | None = None
    template: PairTemplate | None = None

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        truncation: Literal["head", "head_tail"],
        reads_pairs: bool = False,
        has_types: bool = False,
    ) -> "TextEncoder":
        """Return the encoder of a transformers tokenizer, after removing its own truncation.

        Args:
            tokenizer: The tokenizer.
            max_length: As the attribute.
            truncation: As the attribute.
            reads_pairs: Whether an input is a pair of texts.
            has_types: Whether the model knows types of tokens, which only pairs need.

        Raises:
            ModelError: As `read_template`.
        """
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        template = read_template(backend, has_types=has_types) if reads_pairs else None
        return cls(
            backend,
            cls_token_id=int(tokenizer.cls_token_id),
            sep_token_id=int(tokenizer.sep_token_id),
            pad_token_id=int(tokenizer.pad_token_id),
            max_length=max_length,
            truncation=truncation,
            unk_token_id=tokenizer.unk_token_id,
            template=template,
        )

    @property
    def reads_pairs(self) -> bool:
        """Whether an input is a pair of texts."""
        return self.template is not None

    @property
    def has_types(self) -> bool:
        """Whether the tokens of a second text are of type 1."""
        return self.template is not None and self.template.second_type > 0

    @property
    def num_special(self) -> int:
        """Special tokens of an input."""
        return 2 if self.template is None else self.template.num_special

    @property
    def room(self) -> int:
        """Tokens of an input without special tokens."""
        return self.max_length - self.num_special

    def tokenise(self, texts: Sequence[Text]) -> list[TokenIds]:
        """Return all ids of each text, without special tokens."""
        if self.template is None:
            return list(self._tokenise(texts))
        sides = [self._tokenise([text[side] for text in texts]) for side in (0, 1)]
        return list(zip(*sides, strict=True))

    def _tokenise(self, texts: Sequence[Any]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def count(self, ids: TokenIds) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(ids) if isinstance(ids, list) else len(ids[0]) + len(ids[1])

    def is_empty(self, ids: TokenIds) -> bool:
        """Return whether a text, or one of a pair, has no token, or special ones alone."""
        special = {self.cls_token_id, self.sep_token_id, self.pad_token_id}
        parts = [ids] if isinstance(ids, list) else ids
        return any(set(part) <= special for part in parts)

    def truncate(self, ids: TokenIds) -> TokenIds:
        """Return the ids of a text that fit into one input.

        Of a pair, the longer text is cut first, as `longest_first` of tokenizers does.
        """
        if not isinstance(ids, list):
            lengths = _cut_longest(len(ids[0]), len(ids[1]), room=self.room)
            return ids[0][: lengths[0]], ids[1][: lengths[1]]
        if len(ids) <= self.room:
            return ids
        num_first = self.room if self.truncation == "head" else self.room // 4
        num_last = self.room - num_first
        return ids[:num_first] + ids[len(ids) - num_last :]

    def windows(self, ids: list[int], *, stride: int) -> list[list[int]]:
        """Cut the ids of a text into windows that each fit into one input.

        Neighbouring windows share `stride` tokens. The last window ends with the text and may share
        more.
        """
        last_start = max(0, len(ids) - self.room)
        starts = [*range(0, last_start, self.room - stride), last_start]
        return [ids[start : start + self.room] for start in starts]

    def frame(self, ids: TokenIds) -> NDArray[np.int32]:
        """Put [CLS] and [SEP] around the ids of one input, or join a pair by its template."""
        if isinstance(ids, list):
            return np.array([self.cls_token_id, *ids, self.sep_token_id], dtype=np.int32)
        assert self.template is not None
        return np.array(self.template.fill(*ids), dtype=np.int32)

    def encode(self, rows: Rows, *, progress: bool = False) -> Encoded:
        """Return the truncated token ids of rows, with their labels.

        The ids of CACHED_ROWS rows or more are kept on disk and mapped into memory.

        Args:
            rows: The rows.
            progress: Whether to show a progress bar.
        """
        ids = None
        if len(rows) >= CACHED_ROWS:
            ids = keep_ids(self._key(rows), lambda: self._encode_parts(rows, progress=progress))
        if ids is None:
            parts = list(self._encode_parts(rows, progress=progress))
            ids = (
                np.concatenate([input_ids for input_ids, _ in parts]),
                np.concatenate([whole_lengths for _, whole_lengths in parts]),
            )
        input_ids, whole_lengths = ids
        ends = np.minimum(whole_lengths, self.max_length).cumsum()
        return Encoded(
            input_ids,
            offsets=np.concatenate([[0], ends]),
            labels=rows.labels,
            truncated=int((whole_lengths > self.max_length).sum()),
            pad_token_id=self.pad_token_id,
            whole_lengths=whole_lengths,
            unk_token_id=self.unk_token_id,
            num_special=self.num_special,
            has_types=self.has_types,
        )

    def _encode_parts(self, rows: Rows, *, progress: bool) -> Iterator[Part]:
        with make_bar(len(rows), desc="tokenising", unit="rows", show=progress) as bar:
            for start in range(0, len(rows), TOKENISE_ROWS):
                texts = self.tokenise(rows.texts[start : start + TOKENISE_ROWS])
                inputs = [self.frame(self.truncate(ids)) for ids in texts]
                whole_lengths = [self.count(ids) + self.num_special for ids in texts]
                yield np.concatenate(inputs), np.array(whole_lengths, dtype=np.int64)
                bar.update(len(texts))

    def _key(self, rows: Rows) -> str:
        """Return a hash (SHA-256) of everything that decides the ids of rows. Labels do not."""
        settings = [
            LAYOUT,
            self.tokenizer.to_str(),
            self.cls_token_id,
            self.sep_token_id,
            self.max_length,
            self.truncation,
            version("tokenizers"),
        ]
        if self.template is not None:
            settings.append(asdict(self.template))
        return hash_texts(hashlib.sha256(json.dumps(settings).encode()), rows.texts)

    def pack(
        self, inputs: Sequence[NDArray[np.int32]], *, labels: NDArray[np.int64] | None = None
    ) -> Encoded:
        """Put framed inputs into one flat array. Without labels each label is -1."""
        offsets = np.cumsum([0, *map(len, inputs)], dtype=np.int64)
        if labels is None:
            labels = np.full(len(inputs), -1, dtype=np.int64)
        input_ids = np.concatenate(inputs)
        # The inputs may be those of several adapters of one base.
        has_types = int(input_ids.max()) >= SECOND_TYPE
        return Encoded(input_ids, offsets, labels, 0, self.pad_token_id, has_types=has_types)


def _cut_longest(first: int, second: int, *, room: int) -> tuple[int, int]:
    """Return the lengths of two texts after cutting the longer one first, then both alike."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    if first <= second:
        return shorter, room - shorter
    return room - shorter, shorter


def plan_epoch(
    lengths: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return the rows of each optimizer step of one epoch, every row once.

    Rows are shuffled, sorted by length within windows of BUCKET_STEPS steps and cut into steps.
    Then the steps are shuffled. The rows of a step have similar lengths and need little padding.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    steps: list[NDArray[np.int64]] = []
    window_size = batch_size * BUCKET_STEPS
    for start in range(0, len(order), window_size):
        window = order[start : start + window_size]
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
        num_rows = max(1, max_tokens // int(lengths[index[0]]))
        parts.append(index[:num_rows])
        index = index[num_rows:]
    return parts


def shard(
    index: NDArray[np.int64], lengths: NDArray[np.int64], *, rank: int, num_processes: int
) -> NDArray[np.int64]:
    """Return the share of one process. Rows are dealt in order of length for similar work."""
    return index[np.argsort(lengths[index], kind="stable")][rank::num_processes]


def take_rows(encoded: Encoded, index: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """Return the token ids of rows as views. Release the pages of their base after copying."""
    starts = encoded.offsets[index].tolist()
    ends = encoded.offsets[index + 1].tolist()
    return [encoded.input_ids[start:end] for start, end in zip(starts, ends, strict=True)]


Padded = tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.int64] | None]
"""input_ids, attention_mask and token_type_ids, each of shape (num_rows, longest). The mask is None
if no row is padded, and the types are None if all are 0."""


def pad(encoded: Encoded, index: NDArray[np.int64], *, to: Sequence[int] | None = None) -> Padded:
    """Pad rows to the longest among them, or to the next of the ascending lengths `to`."""
    lengths = encoded.lengths[index]
    longest = int(lengths.max())
    for length in to or ():
        if length >= longest:
            longest = length
            break
    input_ids = np.full((len(index), longest), encoded.pad_token_id, dtype=np.int64)
    for padded, ids in zip(input_ids, take_rows(encoded, index), strict=True):
        padded[: len(ids)] = ids
    release_pages(encoded.input_ids.base)
    mask = types = None
    if encoded.has_types:
        input_ids, types = split_types(input_ids)
    if lengths.min() < longest:
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return input_ids, mask, types


def make_batch(
    encoded: Encoded,
    index: NDArray[np.int64],
    *,
    device: "torch.device",
    lengths: Sequence[int] | None = None,
) -> Batch:
    """Pad rows as `pad` does, to the next of `lengths`, and move them to a device."""
    import torch  # late: texts are tokenised without torch

    def move(values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if device.type == "cuda":
            # A copy from other memory may wait for all earlier work of the GPU.
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    input_ids, mask, types = pad(encoded, index, to=lengths)
    return Batch(
        input_ids=move(input_ids),
        attention_mask=None if mask is None else move(mask),
        token_type_ids=None if types is None else move(types),
        labels=move(encoded.labels[index]),
        index=index,
        num_tokens=int(encoded.lengths[index].sum()),
    )
