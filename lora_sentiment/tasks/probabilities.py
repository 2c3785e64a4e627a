"""From logits to probabilities, in numpy alone."""

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from lora_sentiment.errors import ModelError


def softmax(logits: npt.ArrayLike, *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Turn logits into probabilities, in float64: (num_rows, num_labels) for (num_rows, num_labels).

    Raises:
        ModelError: The temperature is not a positive, finite number.
    """
    if not 0 < temperature < np.inf:
        raise ModelError(
            f"temperature: found {temperature}; give a positive number, 1 leaves the logits as they are"
        )
    scaled = np.asarray(logits, dtype=np.float64)
    # The greatest logit becomes 0, so that exp cannot overflow.
    exponentials = np.exp((scaled - scaled.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))
