"""Bootstrap intervals, and paired tests of two classifiers on the same rows.

A bootstrap resample is a row of weights: how often each row of the data was drawn. A weighted
metric scores a chunk of resamples in a few array operations.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import DataError, RecipeError

_WEIGHTS_PER_CHUNK = 2**21
"""16 MiB of float64. Metrics make a few temporary arrays of that size."""


@dataclass(frozen=True)
class Interval:
    """The value of a metric and its confidence interval.

    Attributes:
        value: The metric of the rows themselves, or None if it is undefined.
        low: Lower end of the interval, or None if there is none.
        high: Upper end of the interval, or None if there is none.
        note: Why there is no value, or how many resamples were left out. None if neither applies.
    """

    value: float | None
    low: float | None
    high: float | None
    note: str | None = None

    def as_dict(self) -> dict[str, float | str | None]:
        """Return `{value, low, high}` for JSON, and `note` if there is one."""
        fields: dict[str, float | str | None] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
        }
        if self.note is not None:
            fields["note"] = self.note
        return fields


def show_interval(interval: Mapping[str, Any]) -> str:
    """Return `0.8912 [0.8873, 0.8950]` for an interval's `as_dict`, or `n/a` if it has no value."""
    if interval["value"] is None:
        return "n/a"
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def resample_weights(
    num_rows: int, *, num_resamples: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    """Yield bootstrap resamples as weights, in chunks of bounded memory.

    The same arguments give the same resamples for every metric.

    Yields:
        Weights of shape (chunk, num_rows). Each row sums to `num_rows`. The chunks add up to
        `num_resamples`.

    Raises:
        DataError: There are no rows.
        RecipeError: `num_resamples` is less than 1.
    """
    if num_rows < 1:
        raise DataError("there are no rows to resample; give at least one row")
    if num_resamples < 1:
        raise RecipeError(f"num_resamples: found {num_resamples}; give 1 or more, such as 1000")
    generator = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_PER_CHUNK // num_rows)
    for start in range(0, num_resamples, chunk):
        weights = np.empty((min(chunk, num_resamples - start), num_rows))
        for row in weights:
            drawn = generator.integers(num_rows, size=num_rows)
            row[:] = np.bincount(drawn, minlength=num_rows)
        yield weights


def percentile_interval(
    value: float, resampled: NDArray[np.float64], *, confidence: float, undefined_if: str = ""
) -> Interval:
    """Make a percentile bootstrap interval.

    Chapter 13 of Efron & Tibshirani (1993), "An Introduction to the Bootstrap".
    Resamples on which the metric is undefined are left out of the quantiles and counted in the
    note.

    Args:
        value: The metric of the rows themselves, nan if it is undefined.
        resampled: The metric of each resample, nan where it is undefined, shape (num_resamples,).
        confidence: Share of the resamples between the two ends, such as 0.95.
        undefined_if: When the metric is undefined, in words for the note.

    Raises:
        RecipeError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise RecipeError(
            f"confidence: found {confidence}; give a number between 0 and 1, such as 0.95"
        )
    if np.isnan(value):
        return Interval(value=None, low=None, high=None, note=f"no value: {undefined_if}")
    value = float(value)
    defined = resampled[~np.isnan(resampled)]
    num_left_out = len(resampled) - len(defined)
    note = None
    if num_left_out:
        note = f"{num_left_out} of {len(resampled)} resamples left out: {undefined_if}"
    if not len(defined):
        return Interval(value, low=None, high=None, note=note)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, low=float(low), high=float(high), note=note)


def paired_bootstrap(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Estimate the accuracy of classifier A minus that of classifier B on the same rows.

    Both are scored on the same resamples, so the difficulty of a row cancels.

    Args:
        correct_a: Whether A answers each row correctly, shape (num_rows,).
        correct_b: Whether B answers each row correctly, shape (num_rows,).
        confidence: Share of the resamples inside the interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        DataError: The arrays are empty, of different length, or do not hold truth values.
        RecipeError: `confidence` or `num_resamples` is out of range.
    """
    _check_paired(correct_a, correct_b)
    difference = correct_a.astype(np.float64) - correct_b
    chunks = resample_weights(len(difference), num_resamples=num_resamples, seed=seed)
    resampled = np.concatenate([weights @ difference for weights in chunks]) / len(difference)
    return percentile_interval(difference.mean(), resampled, confidence=confidence)


def paired_metric_bootstrap(
    formula: Callable[[Any, Any, Any], NDArray[np.float64]],
    scores_a: NDArray[np.float64],
    scores_b: NDArray[np.float64],
    labels: NDArray[Any],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Estimate a metric of model A minus that of model B on the same rows and resamples.

    Args:
        formula: As `evaluation.metric.Formula`.
        scores_a: Scores of A, first axis num_rows.
        scores_b: Scores of B.
        labels: The labels of the rows.
        confidence: Share of the resamples inside the interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        DataError: There are no rows.
        RecipeError: `confidence` or `num_resamples` is out of range.
    """

    def differ(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return formula(scores_a, labels, weights) - formula(scores_b, labels, weights)

    chunks = resample_weights(len(labels), num_resamples=num_resamples, seed=seed)
    resampled = np.concatenate([differ(weights) for weights in chunks])
    value = float(differ(np.ones((1, len(labels))))[0])
    return percentile_interval(
        value, resampled, confidence=confidence, undefined_if="the metric has no value"
    )


def mcnemar(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> float:
    """Return the exact two-sided p value of McNemar (1947) for two equally accurate classifiers.

    Only rows that exactly one classifier answers correctly count. Under the hypothesis each such
    row falls to either side with probability 1/2. Without any such row, p is 1.

    Args:
        correct_a: Whether A answers each row correctly, shape (num_rows,).
        correct_b: Whether B answers each row correctly, shape (num_rows,).

    Raises:
        DataError: The arrays are empty, of different length, or do not hold truth values.
    """
    from scipy.stats import binomtest  # slow to import, and only `compare` needs it

    _check_paired(correct_a, correct_b)
    num_only_a = int(np.sum(correct_a & ~correct_b))
    num_only_b = int(np.sum(~correct_a & correct_b))
    if num_only_a + num_only_b == 0:
        return 1.0
    return float(binomtest(num_only_a, num_only_a + num_only_b, 0.5).pvalue)


def _check_paired(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> None:
    for name, correct in (("correct_a", correct_a), ("correct_b", correct_b)):
        if correct.dtype != np.bool_ or correct.ndim != 1 or not len(correct):
            raise DataError(
                f"{name}: found {correct.dtype} values of shape {correct.shape}; give one truth "
                "value per row"
            )
    if len(correct_a) != len(correct_b):
        raise DataError(
            f"found {len(correct_a)} rows for A and {len(correct_b)} for B; score both on the same "
            "rows"
        )
