"""A forward as numpy sees it, whatever computes it: token ids in, logits out. Importing this imports no torch."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import INFERENCE_TOKENS, Encoded, cut, pad
from lora_sentiment.progress import make_bar

Engine = Callable[[NDArray[np.int64], NDArray[np.int64] | None], NDArray[np.float32]]
"""From input_ids and attention_mask (or None where no row is padded), both (num_rows, length), to logits:
(num_rows, num_labels)."""


def compute_logits(engine: Engine, encoded: Encoded, *, progress: str | None = None) -> NDArray[np.float32]:
    """Compute the logits of rows in order of length, so that little is padded, and return them in the rows' order.

    Args:
        engine: What computes.
        encoded: At least one row.
        progress: What to write before a progress bar; None for no bar.

    Returns:
        Logits of shape (num_rows, num_labels).
    """
    parts, order = [], cut(np.arange(len(encoded)), encoded.lengths, max_tokens=INFERENCE_TOKENS)
    with make_bar(int(encoded.lengths.sum()), desc=progress or "", unit="tok", show=progress is not None) as bar:
        for index in order:
            parts.append(engine(*pad(encoded, index)))
            bar.update(int(encoded.lengths[index].sum()))
    return np.asarray(np.concatenate(parts)[np.argsort(np.concatenate(order))], dtype=np.float32)
