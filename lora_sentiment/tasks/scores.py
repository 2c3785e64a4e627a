"""Checks of scores and labels, and softmax and sigmoid. This module imports no torch."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_sentiment.errors import DataError, ModelError


def softmax(logits: ArrayLike, *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Turn logits into probabilities in float64, both of shape (num_rows, num_labels).

    Raises:
        ModelError: The temperature is not a positive, finite number.
    """
    if not 0 < temperature < np.inf:
        raise ModelError(
            f"temperature: found {temperature}; give a positive number; 1 leaves the logits as "
            "they are"
        )
    scaled = np.asarray(logits, dtype=np.float64)
    # The highest logit becomes 0, so that exp cannot overflow.
    exponentials = np.exp((scaled - scaled.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Turn each logit into a probability of its own, in float64."""
    return np.asarray((1 + np.tanh(logits.astype(np.float64) / 2)) / 2)


def check_scores(
    scores: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return logits or probabilities as float64 and labels as int64.

    Raises:
        ModelError: The scores are not finite, or not of shape (num_rows, num_labels) with at least
            two labels.
        DataError: There are no rows, or the labels are not one integer from 0 to num_labels - 1 for
            each row.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ModelError(
            f"logits or probabilities: found shape {scores.shape}; give (num_rows, num_labels), "
            "num_labels 2 or more"
        )
    if not len(scores):
        raise DataError("there are no rows to score; give at least one row")
    not_finite = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(not_finite):
        raise ModelError(
            f"logits or probabilities: found nan or infinity in {show_positions(not_finite)}; the "
            "model has diverged or its dtype is too narrow"
        )
    labels = check_labels(labels, name="labels", num_labels=scores.shape[1])
    if len(labels) != len(scores):
        raise DataError(
            f"found {len(scores)} rows of logits and {len(labels)} labels; give one label per row"
        )
    return scores, labels


def check_finite(logits: ArrayLike, labels: NDArray[Any]) -> NDArray[np.float64]:
    """Return logits of any number of labels as float64.

    Raises:
        ModelError: They are not finite, or not of shape (num_rows, num_labels).
        DataError: There are no rows, or not one label for each.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise ModelError(f"logits: found shape {values.shape}; give (num_rows, num_labels)")
    if not len(values):
        raise DataError("there are no rows to score; give at least one row")
    if len(labels) != len(values):
        raise DataError(
            f"found {len(values)} rows of logits and {len(labels)} labels; give one label per row"
        )
    not_finite = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(not_finite):
        raise ModelError(
            f"logits: found nan or infinity in {show_positions(not_finite)}; the model has diverged "
            "or its dtype is too narrow"
        )
    return values


def check_labels(labels: ArrayLike, *, name: str, num_labels: int) -> NDArray[np.int64]:
    """Return labels as int64.

    Args:
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).
        name: Name of the argument, for messages.
        num_labels: Number of labels.

    Raises:
        DataError: The labels are not such integers.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{name}: found {labels.dtype} values of shape {labels.shape}; give one integer per row"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(outside):
        values = ", ".join(str(value) for value in np.unique(labels[outside])[:5])
        raise DataError(
            f"{name}: found {values} in {show_positions(outside)}; allowed are 0 to "
            f"{num_labels - 1}"
        )
    return labels.astype(np.int64)


def show_positions(positions: NDArray[np.int64]) -> str:
    """Return the first positions of rows, for a message."""
    first = ", ".join(str(position) for position in positions[:5])
    if len(positions) > 5:
        return f"row {first} (counted from 0; {len(positions)} rows in all)"
    return f"row {first} (counted from 0)"
