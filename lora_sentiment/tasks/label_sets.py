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

PERCENTS = range(50, 100)
"""Coverages that are calibrated, in per cent."""
USUAL_COVERAGE = 0.95
COVERAGES, NUM_ROWS, THRESHOLDS = "coverages", "label_rows", "label_thresholds"
"""Keys of a calibration: the coverages; for each label its calibration rows, and its threshold at
each coverage."""


def has_label_sets(calibration: Any) -> bool:
    """Return whether a calibration, or None, holds what label sets need."""
    return THRESHOLDS in (calibration or {})


def fit_label_sets(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> dict[str, list[float] | list[list[float]]]:
    """Return the thresholds of each label at every coverage of PERCENTS, as a calibration has them.

    Args:
        probabilities: Calibrated probabilities of rows that chose nothing, (num_rows, num_labels).
        labels: Labels of these rows, (num_rows,).
    """
    num_rows: list[float] = []
    thresholds = []
    for label, scores in enumerate(1 - probabilities.T):
        own = np.sort(scores[labels == label])
        # In whole numbers, because the ceiling must be exact.
        ranks = [-(-(len(own) + 1) * percent // 100) for percent in PERCENTS]
        # No score is above 1.
        thresholds.append(np.append(own, 1.0)[np.array(ranks) - 1].tolist())
        num_rows.append(float(len(own)))
    coverages = [percent / 100 for percent in PERCENTS]
    return {COVERAGES: coverages, NUM_ROWS: num_rows, THRESHOLDS: thresholds}


def find_set_thresholds(calibration: Any, coverage: float) -> NDArray[np.float64]:
    """Return the threshold of each label, (num_labels,).

    Args:
        calibration: As a card holds it, or None.
        coverage: The coverage that a user asks for.

    Raises:
        ModelError: The model has no label sets, or not at this coverage.
    """
    if not has_label_sets(calibration):
        raise ModelError(
            "coverage: this model was trained without calibration rows, which label sets need; "
            "train it with data.calibration_fraction=0.1, or leave coverage out"
        )
    coverages = calibration[COVERAGES]
    is_asked = np.abs(np.array(coverages) - coverage) < 1e-9
    if not is_asked.any():
        raise ModelError(
            f"coverage: found {coverage}; allowed: {min(coverages):g} to {max(coverages):g} in "
            "whole hundredths, such as 0.9"
        )
    return np.array(calibration[THRESHOLDS])[:, is_asked.argmax()]


def describe_label_sets(calibration: Any, names: Sequence[str]) -> str:
    """Return what the log of a training says."""
    num_rows = int(sum(calibration[NUM_ROWS]))
    told = f"label sets calibrated on {num_rows:,} rows that chose nothing"
    short = describe_short_labels(calibration, USUAL_COVERAGE, names)
    return f"{told}; {short}" if short else told


def describe_short_labels(calibration: Any, coverage: float, names: Sequence[str]) -> str | None:
    """Return which labels have too few calibration rows for a coverage, or None."""
    num_needed = math.ceil(coverage / (1 - coverage) - 1e-9)
    short = []
    for name, num_rows in zip(names, calibration[NUM_ROWS], strict=True):
        if num_rows < num_needed:
            short.append(f"{one_line(name, limit=40)} ({num_rows:.0f})")
    if not short:
        return None
    return (
        f"coverage {coverage:g} needs {num_needed} calibration rows of a label; these labels have "
        f"fewer and stand in every set: {show_names(short)}"
    )


def check_label_sets(calibration: Any, num_labels: int) -> str | None:
    """Return what is wrong with the label sets of a folder, or None."""
    if not has_label_sets(calibration):
        return None
    coverages = np.array(calibration.get(COVERAGES, []), dtype=object)
    num_rows = np.array(calibration.get(NUM_ROWS, []), dtype=object)
    thresholds = np.array(calibration[THRESHOLDS], dtype=object)
    allowed = (num_labels, *coverages.shape)
    is_sound = coverages.ndim == 1 and num_rows.shape == (num_labels,)
    if (
        is_sound
        and thresholds.shape == allowed
        and isinstance(calibration.get("temperature"), float)
    ):
        numbers = [*coverages.tolist(), *thresholds.ravel().tolist()]
        if coverages.size and all(0 <= number <= 1 for number in numbers):
            return None
    return (
        f"{THRESHOLDS}: allowed beside a temperature: for each of the {num_labels} labels one "
        f"number from 0 to 1 for each of {COVERAGES}, and its number of rows in {NUM_ROWS}"
    )
