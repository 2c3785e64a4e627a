"""From rows to padded batches: encode, truncate, bucket by length, cut into micro-batches."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from lora_sentiment.data.rows import Rows
from lora_sentiment.progress import make_bar

BUCKET_STEPS = 50
"""Optimizer steps whose rows are sorted together: enough to pad little, few enough to keep the order random."""
TOKENISE_ROWS = 1000


@dataclass(frozen=True)
class Encoded:
    """Token ids of many texts, compact: one flat array and where each row starts.

    Attributes:
        input_ids: All rows' ids one after another, [CLS] and [SEP] included, shape (num_tokens,).
        offsets: Row i is `input_ids[offsets[i]:offsets[i + 1]]`, shape (num_rows + 1,).
        labels: Shape (num_rows,).
        truncated: How many texts were longer than max_length.
        pad_token_id: Fills a batch's shorter rows.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated: int
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
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

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    index: NDArray[np.int64]
    num_tokens: int


def encode(
    rows: Rows,
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    truncation: Literal["head", "head_tail"],
    progress: bool = False,
) -> Encoded:
    """Tokenise rows.

    Args:
        rows: Texts and labels.
        tokenizer: The base's tokenizer.
        max_length: Most tokens of a row, [CLS] and [SEP] included.
        truncation: `head` keeps the first tokens of a longer text; `head_tail` its first quarter and last three
            quarters (after Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?", section 5.3.1).
        progress: Show a bar.
    """
    room = max_length - 2
    front = room if truncation == "head" else room // 4
    flat: list[NDArray[np.int32]] = []
    lengths = np.zeros(len(rows) + 1, dtype=np.int64)
    truncated = 0
    with make_bar(len(rows), desc="tokenising", unit="rows", show=progress) as bar:
        for start in range(0, len(rows), TOKENISE_ROWS):
            texts = list(rows.texts[start : start + TOKENISE_ROWS])
            for i, ids in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], start):
                if len(ids) > room:
                    truncated += 1
                    ids = ids[:front] + ids[len(ids) - (room - front) :]
                flat.append(np.array([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id], dtype=np.int32))
                lengths[i + 1] = len(ids) + 2
            bar.update(len(texts))
    return Encoded(np.concatenate(flat), np.cumsum(lengths), rows.labels, truncated, int(tokenizer.pad_token_id))


def plan_epoch(lengths: NDArray[np.int64], *, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
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


def cut(index: NDArray[np.int64], lengths: NDArray[np.int64], *, max_tokens: int) -> list[NDArray[np.int64]]:
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


def shard(index: NDArray[np.int64], lengths: NDArray[np.int64], *, rank: int, num_processes: int) -> NDArray[np.int64]:
    """Return one process's share of rows: dealt in order of length, so that all get like work."""
    return index[np.argsort(lengths[index], kind="stable")][rank::num_processes]


def make_batch(encoded: Encoded, index: NDArray[np.int64], *, device: torch.device) -> Batch:
    """Pad rows to the longest among them and move them to a device."""
    lengths = encoded.lengths[index]
    longest = int(lengths.max())
    input_ids = np.full((len(index), longest), encoded.pad_token_id, dtype=np.int64)
    for row, i in enumerate(index):
        input_ids[row, : lengths[row]] = encoded.input_ids[encoded.offsets[i] : encoded.offsets[i + 1]]
    mask = None
    if lengths.min() < longest:
        mask = torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)).to(device, non_blocking=True)
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device, non_blocking=True),
        attention_mask=mask,
        labels=torch.from_numpy(encoded.labels[index]).to(device, non_blocking=True),
        index=index,
        num_tokens=int(lengths.sum()),
    )
