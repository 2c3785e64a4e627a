"""The training loss, as a sum over examples so that it does not depend on how a step was cut."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from lora_sentiment.errors import DataError, RecipeError


def loss_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross-entropy summed over examples, in fp32.

    Divided by the `total_weight` of the whole optimizer step it gives the step's mean however the step was cut:
    averaging the means of unequal micro-batches would not.

    Args:
        logits: Shape (num_rows, num_labels).
        labels: Shape (num_rows,).
        class_weights: Weight of each label in fp32, shape (num_labels,); None where all weigh 1.
        label_smoothing: Share of the target spread over all labels, each part weighted by its own label.
    """
    return F.cross_entropy(
        logits.float(),
        labels,
        weight=class_weights,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def total_weight(labels: NDArray[np.int64], class_weights: NDArray[np.float32] | None) -> float:
    """Return the sum of the weights of these rows' own labels: what the loss of a step is divided by."""
    return (
        float(len(labels))
        if class_weights is None
        else float(class_weights[labels].sum(dtype=np.float64))
    )


def make_class_weights(
    setting: Literal["balanced"] | tuple[float, ...] | None,
    *,
    labels: NDArray[np.int64],
    names: Sequence[str],
) -> NDArray[np.float32] | None:
    """Return the weight of each label, or None where all weigh 1.

    Args:
        setting: The recipe's `train.class_weights`; `balanced` is num_rows / (num_labels * count), after King & Zeng
            (2001), "Logistic Regression in Rare Events Data", as scikit-learn defines it.
        labels: Labels of the training rows, shape (num_rows,).
        names: Label names in order.

    Raises:
        RecipeError: If the list has not one weight a label.
        DataError: If `balanced` meets a label without a training row.
    """
    if setting is None:
        return None
    if setting != "balanced":
        if len(setting) != len(names):
            raise RecipeError(
                f"train.class_weights: found {len(setting)} weights; give one for each of the {len(names)} labels, in "
                f"this order: {', '.join(names)}"
            )
        return np.array(setting, dtype=np.float32)
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        raise DataError(
            f"train.class_weights=balanced: no training row has the label {names[int(counts.argmin())]!r}; leave it "
            "out of data.labels, or give a list of weights"
        )
    return np.asarray(len(labels) / (len(names) * counts), dtype=np.float32)
