"""How sure a measured figure is: bootstrap intervals and the comparison of two classifiers on the same rows.

A bootstrap resample is kept as a row of weights: how often it drew each row of the data. A weighted metric then scores
a whole chunk of resamples in a few array operations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_sentiment.errors import DataError, RecipeError

# 16 MiB of float64 weights per chunk: metrics make a few temporaries of that size, never one for all the resamples.
_WEIGHTS_PER_CHUNK = 2**21


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval, all in the figure's own unit.

    Attributes:
        value: The figure on the rows themselves, or None where it is not defined.
        low: Lower end of the interval, or None where there is none.
        high: Upper end of the interval, or None where there is none.
        note: Why there is no value, or how many resamples the interval leaves out; None if there is nothing to say.
    """

    value: float | None
    low: float | None
    high: float | None
    note: str | None = None

    def as_dict(self) -> dict[str, float | str | None]:
        """Return `{value, low, high}` for JSON, and `note` where there is one."""
        numbers: dict[str, float | str | None] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
        }
        return numbers if self.note is None else {**numbers, "note": self.note}


def show_interval(interval: Mapping[str, Any]) -> str:
    """Return `0.8912 [0.8873, 0.8950]` of an interval's `as_dict`, or `n/a` where it has no value."""
    if interval["value"] is None:
        return "n/a"
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def resample_weights(
    num_rows: int, *, num_resamples: int, seed: int
) -> Iterator[npt.NDArray[np.float64]]:
    """Yield bootstrap resamples as weights, in chunks of bounded memory.

    The same arguments give the same resamples, whichever figure they are used for.

    Yields:
        Weights of shape (chunk, num_rows); each row sums to `num_rows`. The chunks add up to `num_resamples`.

    Raises:
        DataError: There are no rows.
        RecipeError: `num_resamples` is under 1.
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
            row[:] = np.bincount(generator.integers(num_rows, size=num_rows), minlength=num_rows)
        yield weights


def percentile_interval(
    value: float, resampled: npt.NDArray[np.float64], *, confidence: float, undefined_if: str = ""
) -> Interval:
    """Make the percentile bootstrap interval of Efron & Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13.

    Resamples on which the figure is not defined are left out of the quantiles and counted in the note.

    Args:
        value: The figure on the rows themselves; nan where it is not defined.
        resampled: The figure on each resample, nan where it is not defined: (num_resamples,).
        confidence: Share of the resamples between the two ends, such as 0.95.
        undefined_if: When the figure has no value, in words for the note.

    Raises:
        RecipeError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise RecipeError(
            f"confidence: found {confidence}; give a number between 0 and 1, such as 0.95"
        )
    if np.isnan(value):
        return Interval(value=None, low=None, high=None, note=f"no value: {undefined_if}")
    defined = resampled[~np.isnan(resampled)]
    num_left_out = len(resampled) - len(defined)
    note = (
        f"{num_left_out} of {len(resampled)} resamples left out: {undefined_if}"
        if num_left_out
        else None
    )
    if not len(defined):
        return Interval(value=float(value), low=None, high=None, note=note)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value=float(value), low=float(low), high=float(high), note=note)


def paired_bootstrap(
    correct_a: npt.NDArray[np.bool_],
    correct_b: npt.NDArray[np.bool_],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Measure how much more accurate classifier A is than B on the same rows: accuracy of A minus that of B.

    Both are scored on the same resamples, so that what makes a row hard for both cancels.

    Args:
        correct_a: Whether A has each row right: (num_rows,).
        correct_b: Whether B has each row right: (num_rows,).
        confidence: Share of the resamples inside the interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        DataError: The two do not hold one truth value for each of the same rows, or there are none.
        RecipeError: `confidence` or `num_resamples` is out of range.
    """
    _check_paired(correct_a, correct_b)
    difference = correct_a.astype(np.float64) - correct_b
    chunks = resample_weights(len(difference), num_resamples=num_resamples, seed=seed)
    resampled = np.concatenate([weights @ difference for weights in chunks]) / len(difference)
    return percentile_interval(float(difference.mean()), resampled, confidence=confidence)


def mcnemar(correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_]) -> float:
    """Return the exact two-sided p value of McNemar (1947) for two classifiers being equally accurate.

    Only the rows that one has right and the other wrong count; under the hypothesis each falls to either side like a
    fair coin. Without any such row, p is 1.

    Args:
        correct_a: Whether A has each row right: (num_rows,).
        correct_b: Whether B has each row right: (num_rows,).

    Raises:
        DataError: The two do not hold one truth value for each of the same rows, or there are none.
    """
    from scipy.stats import binomtest

    _check_paired(correct_a, correct_b)
    num_only_a = int(np.sum(correct_a & ~correct_b))
    num_only_b = int(np.sum(~correct_a & correct_b))
    if num_only_a + num_only_b == 0:
        return 1.0
    return float(binomtest(num_only_a, num_only_a + num_only_b, 0.5).pvalue)


def _check_paired(correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_]) -> None:
    for name, correct in (("correct_a", correct_a), ("correct_b", correct_b)):
        if correct.dtype != np.bool_ or correct.ndim != 1 or not len(correct):
            raise DataError(
                f"{name}: found {correct.dtype} values of shape {correct.shape}; give one truth value per row"
            )
    if len(correct_a) != len(correct_b):
        raise DataError(
            f"found {len(correct_a)} rows for A and {len(correct_b)} for B; both must be scored on the same rows"
        )
