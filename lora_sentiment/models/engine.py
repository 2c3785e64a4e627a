"""A forward pass behind numpy arrays: token ids in, logits out. This module imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, cut, pad, take_rows
from lora_sentiment.data.packing import cut_packed
from lora_sentiment.data.texts import release_pages


@dataclass(frozen=True)
class Engine:
    """A forward pass, and the size of its batches.

    Attributes:
        compute: Returns logits of shape (num_rows, num_labels) for input_ids, attention_mask and
            token_type_ids, as `pad` returns them. The types are left out if all are 0.
        max_tokens: Most tokens of one call, padding included, unless one row is longer. Larger
            batches work, but are slower.
        compute_rows: Returns logits for the token ids of each row, without padding between rows,
            and `has_types` of `Encoded`. None if rows must be padded.
    """

    compute: Callable[..., NDArray[np.float32]]
    max_tokens: int
    compute_rows: Callable[..., NDArray[np.float32]] | None = None

    def cut(self, index: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut rows into batches of at most `max_tokens` tokens, longest first."""
        if self.compute_rows is None:
            return cut(index, lengths, max_tokens=self.max_tokens)
        longest_first = index[np.argsort(-lengths[index], kind="stable")]
        return cut_packed(longest_first, lengths, max_tokens=self.max_tokens)

    def answer(self, encoded: Encoded, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Compute the logits of one batch, shape (num_rows, num_labels)."""
        if self.compute_rows is None:
            input_ids, mask, types = pad(encoded, index)
            if types is None:
                return self.compute(input_ids, mask)
            return self.compute(input_ids, mask, types)
        logits = self.compute_rows(take_rows(encoded, index), has_types=encoded.has_types)
        release_pages(encoded.input_ids.base)
        return logits


def compute_logits(
    engine: Engine, encoded: Encoded, *, progress: str | None = None
) -> NDArray[np.float32]:
    """Compute the logits of rows. Rows of like length share a batch, so that little is padded.

    Args:
        engine: The forward pass.
        encoded: At least one row.
        progress: Text before a progress bar; None for no bar.

    Returns:
        Logits in the order of the rows, shape (num_rows, num_labels).
    """
    parts = engine.cut(np.arange(len(encoded)), encoded.lengths)
    num_tokens = int(encoded.lengths.sum())
    logits = []
    with make_bar(num_tokens, desc=progress or "", unit="tok", show=progress is not None) as bar:
        for index in parts:
            logits.append(engine.answer(encoded, index))
            bar.update(int(encoded.lengths[index].sum()))
    order = np.argsort(np.concatenate(parts))
    return np.asarray(np.concatenate(logits)[order], dtype=np.float32)
