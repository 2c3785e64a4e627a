"""Temperature scaling: one number, fitted on validation, that makes probabilities mean what they say."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.tasks.metrics import checked, score
from lora_sentiment.tasks.probabilities import softmax

TEMPERATURE_BOUNDS = (0.1, 10.0)
"""Least and greatest temperature: where all of validation is right, the fit alone would claim certainty."""
CALIBRATED = ("log_loss", "ece")
"""The metrics that a temperature changes on purpose; it changes no decision."""


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the temperature within TEMPERATURE_BOUNDS that makes the log-loss of these rows least.

    Section 4.2 of Guo et al. (2017), "On Calibration of Modern Neural Networks": logits are divided by it before
    softmax. The log-loss is convex in 1 / temperature, with the slope mean(expected logit - logit of the right label),
    so the minimum is where the slope crosses zero, or a bound. Logits that do not differ leave it at 1.

    Args:
        logits: Of rows that were not trained on: (num_rows, num_labels).
        labels: Integers from 0 to num_labels - 1: (num_rows,).

    Raises:
        ModelError: The logits have another shape or are not finite.
        DataError: There are no rows, or the labels do not fit the logits.
    """
    from scipy.optimize import brentq

    matrix, vector = checked(logits, labels)
    # Against the right label's logit, so that the slope of a flat row is exactly zero.
    gaps = matrix - matrix[np.arange(len(vector)), vector][:, None]

    def slope(inverse: float) -> float:
        return float((softmax(gaps, temperature=1 / inverse) * gaps).sum(axis=1).mean())

    least, greatest = TEMPERATURE_BOUNDS
    at_least, at_greatest = slope(1 / least), slope(1 / greatest)
    if at_least == at_greatest == 0:
        return 1.0
    if at_least <= 0:
        return least
    if at_greatest >= 0:
        return greatest
    return 1 / float(brentq(slope, 1 / greatest, 1 / least, xtol=1e-12))


def score_calibrated(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, calibration: Mapping[str, float] | None
) -> dict[str, Interval]:
    """Score a classifier by every metric, and by `calibrated_log_loss` and `calibrated_ece` at its temperature.

    Args:
        logits: (num_rows, num_labels), as the model gives them.
        labels: Integers from 0 to num_labels - 1: (num_rows,).
        calibration: What the card holds: {"temperature": ..}; None for an adapter without, which has no such figures.

    Raises:
        ModelError: The logits have another shape or are not finite, or the temperature is not positive.
        DataError: There are no rows, or the labels do not fit the logits.
    """
    found = score(logits, labels)
    if calibration is None:
        return found
    calibrated = score(logits, labels, temperature=calibration["temperature"], names=CALIBRATED)
    return found | {f"calibrated_{name}": interval for name, interval in calibrated.items()}
