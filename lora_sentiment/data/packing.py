"""Pack rows one after another, without padding between them, into arrays of few sizes.

On a GPU a CUDA graph is captured for each size, so a run uses at most `MAX_SIZES` sizes, chosen
from its own steps. Importing this module does not import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import Encoded, plan_epoch, shard, take_rows
from lora_sentiment.data.texts import release_pages

MAX_SIZES = 20
"""Most sizes of a run."""
CANDIDATES = 256
"""Sizes are chosen among this many values. Rounding to them adds at most 0.4 % to the largest
step."""
PLANNED_EPOCHS = 3
"""Epochs whose steps decide the sizes."""
NO_LABEL = -100
"""Label of a missing row, which torch's `cross_entropy` ignores."""


@dataclass(frozen=True)
class Packed:
    """Rows one after another in arrays of a fixed size, then padding.

    The padding forms sequences of its own, so no row attends to it.

    Attributes:
        input_ids: Token ids, shape (size,).
        position_ids: Position of each token in its sequence, shape (size,).
        cu_seq_lens: Start of each sequence, then the end of the last one, shape (num_sequences +
            1,). The first `num_rows` sequences are rows.
        labels: First axis num_rows. A missing row has NO_LABEL, or nan among numbers.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    cu_seq_lens: NDArray[np.int32]
    labels: NDArray[Any]


@dataclass(frozen=True)
class PackPlan:
    """The sizes into which a run packs its micro-batches.

    Attributes:
        sizes: Numbers of tokens of an array, ascending.
        num_rows: Rows of an array. A missing row is a sequence of one padding token.
        num_spare: Sequences that hold the other padding.
        max_length: Most tokens of a sequence.
    """

    sizes: tuple[int, ...]
    num_rows: int
    num_spare: int
    max_length: int

    def size_for(self, num_tokens: int, num_rows: int) -> int:
        """Return the smallest size that holds rows with this total number of tokens.

        Raises:
            ValueError: No size holds them.
        """
        needed = num_tokens + self.num_rows - num_rows
        for size in self.sizes:
            if size >= needed:
                return size
        raise ValueError(f"{needed} tokens do not fit into {self.sizes[-1]}")


def choose_sizes(
    needed: NDArray[np.int64], *, limit: int = MAX_SIZES, multiple: int = 8
) -> tuple[int, ...]:
    """Return the sizes for which rounding up adds the fewest tokens in total, ascending.

    Args:
        needed: Number of tokens that each array has to hold, shape (num_arrays,).
        limit: Most sizes.
        multiple: Each size is a multiple of this.
    """
    step = multiple * math.ceil(int(needed.max()) / (multiple * CANDIDATES))
    values, counts = np.unique(-(-needed // step) * step, return_counts=True)
    # Dynamic programming: best[j] is the smallest total of tokens for the arrays of the first j
    # values.
    below = np.concatenate([[0], np.cumsum(counts)])
    best = np.full(len(values) + 1, np.inf)
    best[0] = 0
    choices = []
    for _ in range(min(limit, len(values))):
        # cost[i, j]: the total if the arrays of values i to j have the size of value j.
        cost = best[:-1, None] + (below[None, 1:] - below[:-1, None]) * values[None, :]
        cost = np.where(np.tri(len(values), k=-1, dtype=bool), np.inf, cost)
        choices.append(cost.argmin(axis=0))
        best = np.concatenate([[0], cost.min(axis=0)])
    sizes = []
    end = len(values)
    for choice in reversed(choices):
        if end == 0:
            break
        sizes.append(int(values[end - 1]))
        end = int(choice[end - 1])
    return tuple(reversed(sizes))


def plan_packing(
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    max_tokens: int,
    max_length: int,
    seed: int,
    num_epochs: int,
    rank: int = 0,
    num_processes: int = 1,
) -> PackPlan:
    """Choose the sizes of one process's micro-batches from the steps of its run.

    Args:
        lengths: Tokens of each training row, shape (num_rows,).
        batch_size: Rows of an optimizer step over all processes.
        max_tokens: Most tokens of a micro-batch.
        max_length: Most tokens of a row.
        seed: The recipe's `train.seed`.
        num_epochs: Passes over the rows.
        rank: Index of this process.
        num_processes: Number of processes.
    """
    num_rows = math.ceil(min(batch_size, len(lengths)) / num_processes)
    needed = []
    for epoch in range(min(num_epochs, PLANNED_EPOCHS)):
        for step in plan_epoch(lengths, batch_size=batch_size, seed=seed, epoch=epoch):
            own = shard(step, lengths, rank=rank, num_processes=num_processes)
            for part in cut_packed(own, lengths, max_tokens=max_tokens):
                needed.append(int(lengths[part].sum()) + num_rows - len(part))
    # No micro-batch of any epoch needs more than this.
    longest_rows = int(np.sort(lengths)[-num_rows:].sum())
    most = min(longest_rows, max(max_tokens, int(lengths.max()))) + num_rows
    sizes = choose_sizes(np.array(needed or [most]), limit=MAX_SIZES - 1)
    if sizes[-1] < most:
        sizes = (*sizes, 8 * math.ceil(most / 8))
    largest_gap = int(np.diff([0, *sizes]).max())
    num_spare = max(1, math.ceil(largest_gap / max_length))
    return PackPlan(sizes, num_rows, num_spare, max_length)


def cut_packed(
    index: NDArray[np.int64], lengths: NDArray[np.int64], *, max_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut rows into few micro-batches of at most `max_tokens` tokens, of similar size, in order.

    A single row longer than that is a micro-batch of its own.
    """
    parts = []
    remaining = int(lengths[index].sum())
    while len(index):
        target = remaining / math.ceil(remaining / max_tokens)
        ends = np.cumsum(lengths[index])
        count = int(np.searchsorted(ends, target)) + 1
        while count > 1 and ends[min(count, len(index)) - 1] > max_tokens:
            count -= 1
        parts.append(index[:count])
        remaining -= int(lengths[index[:count]].sum())
        index = index[count:]
    return parts


def pack(encoded: Encoded, index: NDArray[np.int64], *, plan: PackPlan) -> Packed:
    """Pack rows into the smallest array of a plan that holds them.

    Args:
        encoded: All rows.
        index: Positions of the rows to pack, at most `plan.num_rows`.
        plan: The sizes.

    Raises:
        ValueError: No size holds them.
    """
    lengths = encoded.lengths[index]
    rows = take_rows(encoded, index)
    size = plan.size_for(int(lengths.sum()), len(index))
    packed = pack_rows(
        rows,
        size=size,
        num_rows=plan.num_rows,
        num_spare=plan.num_spare,
        max_length=plan.max_length,
        pad_token_id=encoded.pad_token_id,
    )
    labels = encoded.labels[index]
    missing = np.nan if labels.dtype.kind == "f" else NO_LABEL
    filled = np.full((plan.num_rows, *labels.shape[1:]), missing, dtype=labels.dtype)
    filled[: len(index)] = labels
    release_pages(encoded.input_ids.base)
    return replace(packed, labels=filled)


def pack_rows(
    rows: Sequence[NDArray[np.int32]],
    *,
    size: int,
    num_rows: int,
    num_spare: int,
    max_length: int,
    pad_token_id: int,
) -> Packed:
    """Put rows one after another into an array of a given size. Every label is NO_LABEL.

    Args:
        rows: Token ids of each row.
        size: Tokens of the array.
        num_rows: Rows of the array. A missing row becomes a sequence of one padding token.
        num_spare: Sequences for the other padding.
        max_length: Most tokens of a sequence.
        pad_token_id: Fills the padding.

    Raises:
        ValueError: The rows or the padding do not fit.
    """
    missing = num_rows - len(rows)
    num_tokens = sum(len(row) for row in rows)
    left = size - num_tokens - missing
    if missing < 0 or left < 0 or left > num_spare * max_length:
        raise ValueError(
            f"{len(rows)} rows of {num_tokens} tokens do not fit into {num_rows} rows of {size}"
        )
    lengths = np.ones(num_rows + num_spare, dtype=np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    spare = np.arange(num_spare) * max_length
    lengths[num_rows:] = np.clip(left - spare, 0, max_length)
    ends = np.cumsum(lengths, dtype=np.int32)
    cu_seq_lens = np.concatenate([np.zeros(1, dtype=np.int32), ends])
    input_ids = np.full(size, pad_token_id, dtype=np.int32)
    if rows:
        np.concatenate(rows, out=input_ids[:num_tokens])
    position_ids = np.arange(size, dtype=np.int32) - np.repeat(cu_seq_lens[:-1], lengths)
    return Packed(input_ids, position_ids, cu_seq_lens, np.full(num_rows, NO_LABEL, dtype=np.int64))
