"""Conformal label sets: the labels of a text that cannot be ruled out at a coverage.

Split conformal prediction for each label apart: section 2 of Vovk (2012), "Conditional validity of
inductive conformal predictors". The score of a label is 1 minus its calibrated probability. A set
holds every label whose score is at most the label's threshold: the k-th smallest score among the n
calibration rows with that label, k = ceil((n + 1) * coverage). New rows that are drawn as these
were have their label in the set with at least that probability, for each label. With k = n + 1
there is no such score, and the label stands in every set. This module imports no torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import ModelError, one_line, show_names

LABEL_SCORES = "label_scores"
"""Key of a calibration: for each label the sorted scores of its calibration rows."""
MAX_SCORES = 1000
"""Most scores of a label that a card holds."""


def fit_label_scores(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> list[list[float]]:
    """Return the sorted scores of each label's rows, rounded upward, which only adds labels.

    Args:
        probabilities: Calibrated probabilities of rows that chose nothing, (num_rows, num_labels).
        labels: Labels of these rows, (num_rows,).
    """
    label_scores = []
    for label, scores in enumerate(1 - probabilities.T):
        own = scores[labels == label]
        own = np.sort(own[:: 1 + len(own) // (MAX_SCORES + 1)])
        label_scores.append((np.ceil(own * 1e6) / 1e6).tolist())
    return label_scores


def find_set_thresholds(calibration: Any, coverage: float) -> NDArray[np.float64]:
    """Return for each label the largest score of a set that holds it, (num_labels,).

    Raises:
        ModelError: The calibration of the model, which may be None, has no label scores, or the
            coverage is no probability.
    """
    if not 0 < coverage < 1:
        raise ModelError(f"coverage: found {coverage}; allowed: more than 0, less than 1, as 0.95")
    if LABEL_SCORES not in (calibration or {}):
        raise ModelError(
            "coverage: this model was trained without calibration rows, which label sets need; "
            "train single labels with data.calibration_fraction=0.1, or leave coverage out"
        )
    thresholds = []
    for scores in calibration[LABEL_SCORES]:
        rank = max(1, math.ceil((len(scores) + 1) * coverage - 1e-9))
        thresholds.append([*scores, 1.0][rank - 1])
    return np.array(thresholds)


def make_label_set(
    probabilities: NDArray[np.float64], thresholds: NDArray[np.float64], names: Sequence[str]
) -> list[str]:
    """Return the labels of a text that cannot be ruled out.

    Args:
        probabilities: Calibrated probabilities of its labels, (num_labels,).
        thresholds: As `find_set_thresholds` returns them.
        names: Label names in order.
    """
    return [names[i] for i in np.flatnonzero(1 - probabilities <= thresholds).tolist()]


def describe_short_labels(calibration: Any, coverage: float, names: Sequence[str]) -> str | None:
    """Return which labels have too few calibration rows for a coverage, or None."""
    num_needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    short = []
    for name, scores in zip(names, calibration[LABEL_SCORES], strict=True):
        if len(scores) < num_needed:
            short.append(f"{one_line(name, limit=40)} ({len(scores)})")
    if not short:
        return None
    return (
        f"coverage {coverage:g} needs {num_needed} calibration rows of a label; these labels have "
        f"fewer and stand in every set: {show_names(short)}"
    )
