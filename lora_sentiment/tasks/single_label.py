"""One label for each text: the training loss, probabilities and their calibration.

Importing this module does not import torch: a classifier saved as ONNX answers without torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_sentiment.errors import DataError, ModelError, RecipeError, show

if TYPE_CHECKING:
    import torch

TEMPERATURE_BOUNDS = (0.1, 10.0)
"""Lowest and highest temperature. If every validation row is right, the best fit would be
certainty."""


def loss_sum(
    logits: "torch.Tensor",
    labels: "torch.Tensor",
    *,
    class_weights: "torch.Tensor | None" = None,
    label_smoothing: float = 0.0,
) -> "torch.Tensor":
    """Return the cross-entropy summed over the rows, in fp32.

    The sum over all micro-batches, divided by the `total_weight` of the optimizer step, is the mean
    loss of the step. The mean of the means of unequal micro-batches is not.

    Args:
        logits: Shape (num_rows, num_labels).
        labels: Shape (num_rows,).
        class_weights: Weight of each label in fp32, shape (num_labels,). None means 1 for each
            label.
        label_smoothing: Share of the target that is spread over all labels, each part weighted by
            its own label.
    """
    from torch.nn import functional as F  # late: labels are read without torch

    return F.cross_entropy(
        logits.float(),
        labels,
        weight=class_weights,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def total_weight(labels: NDArray[np.int64], class_weights: NDArray[np.float32] | None) -> float:
    """Return the sum of the weights of the rows, by which the summed loss of a step is divided."""
    if class_weights is None:
        return float(len(labels))
    return float(class_weights[labels].sum(dtype=np.float64))


def make_class_weights(
    setting: Literal["balanced"] | tuple[float, ...] | None,
    *,
    labels: NDArray[np.int64],
    names: Sequence[str],
) -> NDArray[np.float32] | None:
    """Return the weight of each label, or None if each weighs 1.

    Args:
        setting: The recipe's `train.class_weights`. `balanced` means num_rows / (num_labels * rows
            of the label), after King & Zeng (2001), "Logistic Regression in Rare Events Data", as
            scikit-learn defines it.
        labels: Labels of the training rows, shape (num_rows,).
        names: Label names in order.

    Raises:
        RecipeError: The list does not hold one weight for each label.
        DataError: The setting is `balanced` and a label has no training row.
    """
    if setting is None:
        return None
    if setting != "balanced":
        if len(setting) != len(names):
            raise RecipeError(
                f"train.class_weights: found {len(setting)} weights; give one for each of the "
                f"{len(names)} labels, in this order: {', '.join(names)}"
            )
        return np.array(setting, dtype=np.float32)
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        unused = ", ".join(show(names[int(label)]) for label in np.flatnonzero(counts == 0))
        raise DataError(
            f"train.class_weights=balanced: no training row has the label {unused}; add rows with "
            "it, or give a list of weights"
        )
    return np.asarray(len(labels) / (len(names) * counts), dtype=np.float32)


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


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the temperature within TEMPERATURE_BOUNDS that gives these rows the lowest log loss.

    The logits are divided by the temperature before softmax: section 4.2 of Guo et al. (2017), "On
    Calibration of Modern Neural Networks". The log loss is convex in 1 / temperature, with the
    slope mean(expected logit - logit of the right label). Its minimum is where the slope crosses
    zero, or a bound. If all logits are equal, the result is 1.

    Args:
        logits: Logits of rows that were not trained on, shape (num_rows, num_labels).
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).

    Raises:
        ModelError: The logits have another shape or are not finite.
        DataError: There are no rows, or the labels do not fit the logits.
    """
    from scipy.optimize import brentq  # slow to import, and only training needs it

    logits, labels = check_scores(logits, labels)
    right_logits = logits[np.arange(len(labels)), labels]
    # Relative to the logit of the right label, so that the slope of a row of equal logits is
    # exactly zero.
    gaps = logits - right_logits[:, None]

    def slope(inverse: float) -> float:
        return float((softmax(gaps, temperature=1 / inverse) * gaps).sum(axis=1).mean())

    lowest, highest = TEMPERATURE_BOUNDS
    slope_at_lowest = slope(1 / lowest)
    slope_at_highest = slope(1 / highest)
    if slope_at_lowest == slope_at_highest == 0:
        return 1.0
    if slope_at_lowest <= 0:
        return lowest
    if slope_at_highest >= 0:
        return highest
    return 1 / float(brentq(slope, 1 / highest, 1 / lowest, xtol=1e-12))


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
            f"logits or probabilities: found nan or infinity in {_show_positions(not_finite)}; the "
            "model has diverged or its dtype is too narrow"
        )
    labels = check_labels(labels, name="labels", num_labels=scores.shape[1])
    if len(labels) != len(scores):
        raise DataError(
            f"found {len(scores)} rows of logits and {len(labels)} labels; give one label per row"
        )
    return scores, labels


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
            f"{name}: found {values} in {_show_positions(outside)}; allowed are 0 to "
            f"{num_labels - 1}"
        )
    return labels.astype(np.int64)


def _show_positions(positions: NDArray[np.int64]) -> str:
    first = ", ".join(str(position) for position in positions[:5])
    if len(positions) > 5:
        return f"row {first} (counted from 0; {len(positions)} rows in all)"
    return f"row {first} (counted from 0)"
