"""A forward as numpy sees it, whatever computes it: token ids in, logits out. Importing this imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import Encoded, cut, pad
from lora_sentiment.progress import make_bar


@dataclass(frozen=True)
class Engine:
    """What computes, and how much it should be given at once.

    Attributes:
        compute: From input_ids and attention_mask (or None where no row is padded), both (num_rows, length), to
            logits: (num_rows, num_labels).
        max_tokens: Padded tokens of one call, where a row alone is not longer; more is computed too, but slower.
    """

    compute: Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
    max_tokens: int


def compute_logits(engine: Engine, encoded: Encoded, *, progress: str | None = None) -> NDArray[np.float32]:
    """Compute the logits of rows in order of length, so that little is padded, and return them in the rows' order.

    Args:
        engine: What computes.
        encoded: At least one row.
        progress: What to write before a progress bar; None for no bar.

    Returns:
        Logits of shape (num_rows, num_labels).
    """
    parts, order = [], cut(np.arange(len(encoded)), encoded.lengths, max_tokens=engine.max_tokens)
    with make_bar(int(encoded.lengths.sum()), desc=progress or "", unit="tok", show=progress is not None) as bar:
        for index in order:
            parts.append(engine.compute(*pad(encoded, index)))
            bar.update(int(encoded.lengths[index].sum()))
    return np.asarray(np.concatenate(parts)[np.argsort(np.concatenate(order))], dtype=np.float32)
