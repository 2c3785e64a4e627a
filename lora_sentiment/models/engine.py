"""A forward as numpy sees it, whatever computes it: token ids in, logits out. Importing this imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, cut, pad, take_rows
from lora_sentiment.data.packing import cut_packed
from lora_sentiment.data.texts import release_pages


@dataclass(frozen=True)
class Engine:
    """What computes, and how much it should be given at once.

    Attributes:
        compute: From input_ids and attention_mask (or None where no row is padded), both (num_rows, length), to
            logits: (num_rows, num_labels).
        max_tokens: Tokens of one call, padding included, where a row alone is not longer; more is computed too, but
            slower.
        compute_rows: From the token ids of each row to logits, without padding between rows; None where rows have to
            be padded.
    """

    compute: Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
    max_tokens: int
    compute_rows: Callable[[Sequence[NDArray[np.int32]]], NDArray[np.float32]] | None = None

    def cut(self, index: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut rows into batches of at most `max_tokens` tokens, longest first."""
        if self.compute_rows is None:
            return cut(index, lengths, max_tokens=self.max_tokens)
        longest_first = index[np.argsort(-lengths[index], kind="stable")]
        return cut_packed(longest_first, lengths, max_tokens=self.max_tokens)

    def answer(self, encoded: Encoded, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Compute the logits of one batch, shape (num_rows, num_labels)."""
        if self.compute_rows is None:
            return self.compute(*pad(encoded, index))
        logits = self.compute_rows(take_rows(encoded, index))
        release_pages(encoded.input_ids.base)
        return logits


def compute_logits(
    engine: Engine, encoded: Encoded, *, progress: str | None = None
) -> NDArray[np.float32]:
    """Compute the logits of rows in order of length, so that little is padded, and return them in the rows' order.

    Args:
        engine: What computes.
        encoded: At least one row.
        progress: What to write before a progress bar; None for no bar.

    Returns:
        Logits of shape (num_rows, num_labels).
    """
    parts, order = [], engine.cut(np.arange(len(encoded)), encoded.lengths)
    with make_bar(
        int(encoded.lengths.sum()), desc=progress or "", unit="tok", show=progress is not None
    ) as bar:
        for index in order:
            parts.append(engine.answer(encoded, index))
            bar.update(int(encoded.lengths[index].sum()))
    return np.asarray(np.concatenate(parts)[np.argsort(np.concatenate(order))], dtype=np.float32)
