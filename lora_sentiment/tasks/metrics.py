"""The figures that say how good a classifier is, each with a bootstrap interval.

To add a metric, write one class here and name it in `METRICS` below. Its formula is written once, for weighted rows:
with weights of one it gives the figure itself, with a resample's counts the figure on that resample. Each class is
also an `evaluate.Metric`, so it works wherever one is expected; nothing here reads or writes a file or the network.
"""

import difflib
from collections.abc import Collection
from typing import ClassVar

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from lora_sentiment.errors import DataError, ModelError, RecipeError
from lora_sentiment.evaluation.statistics import Interval, percentile_interval, resample_weights
from lora_sentiment.tasks.probabilities import softmax

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class ClassificationMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no type hints
    """A figure computed from class probabilities and labels.

    `Accuracy().compute(predictions=probabilities, references=labels)` gives `{"accuracy": ...}`.

    Attributes:
        name: Its key in `report.json` and its value for `train.metric_for_best_model`.
        greater_is_better: Whether the best checkpoint has the greatest value.
        undefined_if: When `values` gives nan, in words for the report.
    """

    name: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    undefined_if: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        """Compute the figure once for each row of weights.

        Args:
            probabilities: (num_rows, num_labels).
            labels: (num_rows,).
            weights: How often each resample holds each row, not all zero: (num_resamples, num_rows).

        Returns:
            The figures, nan where one is not defined: (num_resamples,).
        """
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions: a list of class probabilities per row. references: a label per row.",
            features=datasets.Features(features),
        )

    def _build_data_dir(self) -> str:
        # The base class makes a cache folder in the user's home here; with keep_in_memory nothing is ever put in it.
        return ""

    def _compute(
        self, *, predictions: npt.ArrayLike, references: npt.ArrayLike
    ) -> dict[str, float]:
        probabilities, labels = checked(predictions, references)
        if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
            raise ModelError(
                "predictions: found rows that are no probabilities; apply softmax to logits first"
            )
        return {self.name: float(self.values(probabilities, labels, np.ones((1, len(labels))))[0])}


class Accuracy(ClassificationMetric):
    """Share of the rows whose most probable label is right, from 0 to 1."""

    name = "accuracy"

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        return _means(probabilities.argmax(axis=1) == labels, weights)


class MacroF1(ClassificationMetric):
    """F1 averaged over the labels that occur, as truth or as prediction, from 0 to 1."""

    name = "macro_f1"

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        predictions, num_labels = probabilities.argmax(axis=1), probabilities.shape[1]
        num_true_positives = _group_sums(weights * (predictions == labels), labels, num_labels)
        num_either = _group_sums(weights, labels, num_labels) + _group_sums(
            weights, predictions, num_labels
        )
        f1 = 2 * num_true_positives / np.maximum(num_either, 1)
        return np.asarray(f1.sum(axis=1) / (num_either > 0).sum(axis=1))


class MCC(ClassificationMetric):
    """Matthews correlation coefficient of predictions and labels, from -1 to 1; 0 where either is constant.

    The many-label form of Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation
    coefficient", equation 8.
    """

    name = "mcc"

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        predictions, num_labels = probabilities.argmax(axis=1), probabilities.shape[1]
        num_rows, num_correct = weights.sum(axis=1), weights @ (predictions == labels)
        num_true = _group_sums(weights, labels, num_labels)
        num_predicted = _group_sums(weights, predictions, num_labels)
        covariance = num_correct * num_rows - (num_true * num_predicted).sum(axis=1)
        variance_true = num_rows**2 - (num_true**2).sum(axis=1)
        variance_predicted = num_rows**2 - (num_predicted**2).sum(axis=1)
        scale = np.sqrt(variance_true * variance_predicted)
        return np.asarray(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0))


class LogLoss(ClassificationMetric):
    """Mean of -log(probability of the right label), in nats; a probability counts as at least 2.2e-16."""

    name = "log_loss"
    greater_is_better = False

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        epsilon = np.finfo(np.float64).eps
        right = probabilities[np.arange(len(labels)), labels]
        return _means(-np.log(np.clip(right, epsilon, 1 - epsilon)), weights)


class AUROC(ClassificationMetric):
    """Probability that a row of a label scores above a row without it, ties counting half, from 0 to 1.

    With two labels it is that of label 1; with more, the mean over the labels that occur, each against the rest.
    The rank statistic of Hanley & McNeil (1982), "The meaning and use of the area under a ROC curve".
    """

    name = "auroc"
    undefined_if = "the rows hold one label only"

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        num_labels = probabilities.shape[1]
        total, num_defined = np.zeros(len(weights)), np.zeros(len(weights))
        for label in [1] if num_labels == 2 else range(num_labels):
            distinct, ranks = np.unique(probabilities[:, label], return_inverse=True)
            # One pass counts, for each distinct score, the rows of other labels (even cell) and of this one (odd).
            counts = _group_sums(weights, 2 * ranks + (labels == label), 2 * len(distinct))
            others, own = counts[:, 0::2], counts[:, 1::2]
            num_won = (own * (others.cumsum(axis=1) - others / 2)).sum(axis=1)
            num_pairs = others.sum(axis=1) * own.sum(axis=1)
            total += num_won / np.maximum(num_pairs, 1)
            num_defined += num_pairs > 0
        undefined = np.full(len(weights), np.nan)
        return np.asarray(np.divide(total, num_defined, out=undefined, where=num_defined > 0))


class ExpectedCalibrationError(ClassificationMetric):
    """Gap between confidence and accuracy, averaged over rows in 15 equal-width bins of confidence, from 0 to 1.

    Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 3; confidence is that of the most probable
    label, a bin holds its upper edge. Noise in a bin only ever adds to it: it is biased upward on few rows, and more so
    on a resample of them, so that the interval of a well calibrated classifier can lie above its value.
    """

    name = "ece"
    greater_is_better = False

    @staticmethod
    def values(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
        num_bins = 15
        confidence = probabilities.max(axis=1)
        bins = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence, side="left")
        gaps = (probabilities.argmax(axis=1) == labels) - confidence
        return np.asarray(
            np.abs(_group_sums(weights * gaps, bins, num_bins)).sum(axis=1) / weights.sum(axis=1)
        )


def score(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    temperature: float = 1.0,
    names: Collection[str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score a classifier by metrics, each with a percentile bootstrap interval over the rows.

    All metrics see the same resamples. Where a metric has no value, its interval holds None and a note says why.

    Args:
        logits: (num_rows, num_labels), at least two labels.
        labels: Integers from 0 to num_labels - 1: (num_rows,).
        temperature: The logits are divided by it before softmax.
        names: Keys of `METRICS`; all by default.
        confidence: Share of the resamples inside each interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        ModelError: The logits have another shape or are not finite, or the temperature is not positive.
        DataError: There are no rows, or the labels do not fit the logits.
        RecipeError: `confidence` or `num_resamples` is out of range, or there is no metric of a name.
    """
    metrics = {name: find_metric(name) for name in (METRICS if names is None else names)}
    checked_logits, checked_labels = checked(logits, labels)
    probabilities = softmax(checked_logits, temperature=temperature)
    resampled: dict[str, list[Floats]] = {name: [] for name in metrics}
    for weights in resample_weights(len(checked_labels), num_resamples=num_resamples, seed=seed):
        for name, metric in metrics.items():
            resampled[name].append(metric.values(probabilities, checked_labels, weights))
    every_row_once = np.ones((1, len(checked_labels)))
    return {
        name: percentile_interval(
            metric.values(probabilities, checked_labels, every_row_once)[0],
            np.concatenate(resampled[name]),
            confidence=confidence,
            undefined_if=metric.undefined_if,
        )
        for name, metric in metrics.items()
    }


def quick_score(logits: npt.ArrayLike, labels: npt.ArrayLike, metric_name: str) -> float:
    """Score a classifier by one metric, without an interval, as an evaluation during training does.

    Args:
        logits: (num_rows, num_labels), at least two labels.
        labels: Integers from 0 to num_labels - 1: (num_rows,).
        metric_name: A key of `METRICS`.

    Raises:
        RecipeError: There is no metric of that name.
        ModelError: The logits have another shape or are not finite.
        DataError: There are no rows, the labels do not fit the logits, or the metric has no value on these rows.
    """
    metric = find_metric(metric_name)
    checked_logits, checked_labels = checked(logits, labels)
    every_row_once = np.ones((1, len(checked_labels)))
    value = float(metric.values(softmax(checked_logits), checked_labels, every_row_once)[0])
    if np.isnan(value):
        raise DataError(
            f"{metric_name} has no value: {metric.undefined_if}; add rows or choose another metric"
        )
    return value


def find_metric(name: str) -> type[ClassificationMetric]:
    """Return the metric of that name.

    Raises:
        RecipeError: There is none.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(f"'{name}' is no metric; choose from {', '.join(METRICS)}{hint}")
    return METRICS[name]


def confusion_matrix(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, num_labels: int
) -> Integers:
    """Count the rows by true label (first axis) and predicted label (second axis): (num_labels, num_labels).

    Raises:
        DataError: Labels and predictions are no integers from 0 to num_labels - 1, or differ in number.
    """
    truth = _checked_labels(labels, name="labels", num_labels=num_labels)
    predicted = _checked_labels(predictions, name="predictions", num_labels=num_labels)
    if len(truth) != len(predicted):
        raise DataError(
            f"found {len(truth)} labels and {len(predicted)} predictions; give one of each per row"
        )
    return np.bincount(num_labels * truth + predicted, minlength=num_labels**2).reshape(
        num_labels, num_labels
    )


def _means(amounts: npt.NDArray[np.float64] | npt.NDArray[np.bool_], weights: Floats) -> Floats:
    return np.asarray(weights @ amounts / weights.sum(axis=1))


def _group_sums(weights: Floats, groups: Integers, num_groups: int) -> Floats:
    """Add up each resample's weights by group: (num_resamples, num_groups)."""
    return np.stack([np.bincount(groups, weights=row, minlength=num_groups) for row in weights])


def checked(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Integers]:
    """Return logits or probabilities as float64 and labels as int64, or say what is wrong with them.

    Raises:
        ModelError: The scores are not (num_rows, num_labels) with two labels or more, or not finite.
        DataError: There are no rows, or the labels are no integers from 0 to num_labels - 1, one a row.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[1] < 2:
        raise ModelError(
            f"logits or probabilities: found shape {matrix.shape}; give (num_rows, num_labels), num_labels 2 or more"
        )
    if not len(matrix):
        raise DataError("there are no rows to score; give at least one row")
    not_finite = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(not_finite):
        raise ModelError(
            f"logits or probabilities: found nan or infinity in {_show_rows(not_finite)}; "
            "the model has diverged or its dtype is too narrow"
        )
    vector = _checked_labels(labels, name="labels", num_labels=matrix.shape[1])
    if len(vector) != len(matrix):
        raise DataError(
            f"found {len(matrix)} rows of logits and {len(vector)} labels; give one label per row"
        )
    return matrix, vector


def _checked_labels(labels: npt.ArrayLike, *, name: str, num_labels: int) -> Integers:
    vector = np.asarray(labels)
    if vector.ndim != 1 or vector.dtype.kind not in "iu":
        raise DataError(
            f"{name}: found {vector.dtype} values of shape {vector.shape}; give one integer per row"
        )
    outside = np.flatnonzero((vector < 0) | (vector >= num_labels))
    if len(outside):
        found = ", ".join(str(value) for value in np.unique(vector[outside])[:5])
        raise DataError(
            f"{name}: found {found} in {_show_rows(outside)}; allowed are 0 to {num_labels - 1}"
        )
    return vector.astype(np.int64)


def _show_rows(rows: Integers) -> str:
    shown = ", ".join(str(row) for row in rows[:5])
    return f"row {shown} (counted from 0{f'; {len(rows)} rows in all' if len(rows) > 5 else ''})"


METRICS: dict[str, type[ClassificationMetric]] = {
    metric.name: metric
    for metric in (Accuracy, MacroF1, MCC, LogLoss, AUROC, ExpectedCalibrationError)
}
