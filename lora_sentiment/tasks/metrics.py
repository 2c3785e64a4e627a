"""Metrics of a classifier, each with a bootstrap interval.

To add a metric, write its formula as a function and name it in `METRICS`. A formula takes weighted
rows. Weights of 1 give the metric itself; the counts of a bootstrap resample give the metric of
that resample. Each entry of `METRICS` is also an `evaluate.Metric`. Nothing here reads or writes a
file or the network.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_sentiment.errors import DataError, ModelError, RecipeError, did_you_mean, show
from lora_sentiment.evaluation.metric import Formula, Metric, score_metrics
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.tasks.scores import check_labels, check_scores, softmax

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
CALIBRATED = ("log_loss", "ece")
"""The metrics that depend on the temperature. A temperature changes no decision."""
FEW_ROWS = 50
"""Most rows of a label that `auroc` compares with every other row. More are counted by ranks."""
NUM_BINS = 15
"""Bins of the expected calibration error."""


class ClassificationMetric(Metric, evaluate.Metric):  # type: ignore[misc]  # no type hints
    """A formula of class probabilities and labels, usable as a metric of `evaluate`.

    `METRICS["accuracy"].compute(predictions=probabilities, references=labels)` returns
    `{"accuracy": ...}`.
    """

    def __init__(self, name: str, values: Formula, **options: Any) -> None:
        Metric.__init__(self, name, values, **options)
        evaluate.Metric.__init__(self, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=self.values.__doc__,
            citation="",
            inputs_description="predictions: class probabilities per row. references: labels.",
            features=datasets.Features(features),
        )

    def _build_data_dir(self) -> str:
        # The base class would make a folder in the user's home. With keep_in_memory the folder
        # would stay empty.
        return ""

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
        probabilities, labels = check_scores(predictions, references)
        if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
            raise ModelError(
                "predictions: found rows that are no probabilities; apply softmax to logits first"
            )
        return {self.name: self.value(probabilities, labels)}


def accuracy(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the share of rows whose most probable label is right, from 0 to 1."""
    return _weighted_means(probabilities.argmax(axis=1) == labels, weights)


def macro_f1(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean F1 of the labels that occur as truth or as prediction, from 0 to 1."""
    predictions = probabilities.argmax(axis=1)
    num_labels = probabilities.shape[1]
    num_true_positives = _group_sums(weights * (predictions == labels), labels, num_labels)
    num_true = _group_sums(weights, labels, num_labels)
    num_predicted = _group_sums(weights, predictions, num_labels)
    num_either = num_true + num_predicted
    f1 = 2 * num_true_positives / np.maximum(num_either, 1)
    return np.asarray(f1.sum(axis=1) / (num_either > 0).sum(axis=1))


def mcc(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return Matthews' correlation coefficient, from -1 to 1; 0 if truth or prediction is constant.

    The formula for many labels is equation 8 of Gorodkin (2004), "Comparing two K-category
    assignments by a K-category correlation coefficient".
    """
    predictions = probabilities.argmax(axis=1)
    num_labels = probabilities.shape[1]
    num_rows = weights.sum(axis=1)
    num_correct = weights @ (predictions == labels)
    num_true = _group_sums(weights, labels, num_labels)
    num_predicted = _group_sums(weights, predictions, num_labels)
    covariance = num_correct * num_rows - (num_true * num_predicted).sum(axis=1)
    variance_true = num_rows**2 - (num_true**2).sum(axis=1)
    variance_predicted = num_rows**2 - (num_predicted**2).sum(axis=1)
    scale = np.sqrt(variance_true * variance_predicted)
    return np.asarray(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0))


def log_loss(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean of -log(probability of the right label), in nats, clipped at 2.2e-16."""
    epsilon = np.finfo(np.float64).eps
    right = probabilities[np.arange(len(labels)), labels]
    return _weighted_means(-np.log(np.clip(right, epsilon, 1 - epsilon)), weights)


def auroc(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the probability that a row of a label scores above another row. Ties count half.

    Two labels: the AUROC of label 1. More labels: the mean over the labels that occur, each against
    the rest. The rank statistic is that of Hanley & McNeil (1982), "The meaning and use of the area
    under a ROC curve".
    """
    num_labels = probabilities.shape[1]
    total = np.zeros(len(weights))
    num_defined = np.zeros(len(weights))
    for label in [1] if num_labels == 2 else range(num_labels):
        is_own = labels == label
        num_own = weights @ is_own
        num_pairs = num_own * (weights @ ~is_own)
        num_won = _count_won(probabilities[:, label], is_own, weights)
        total += num_won / np.maximum(num_pairs, 1)
        num_defined += num_pairs > 0
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(total, num_defined, out=undefined, where=num_defined > 0))


def _count_won(scores: Floats, is_own: NDArray[np.bool_], weights: Floats) -> Floats:
    """Count the pairs in which a row of a label scores above another row: (num_resamples,).

    Args:
        scores: Shape (num_rows,).
        is_own: Which rows have the label, shape (num_rows,).
        weights: Shape (num_resamples, num_rows).
    """
    own_scores = scores[is_own][:, None]
    if len(own_scores) <= FEW_ROWS:
        is_won = (own_scores > scores) + (own_scores == scores) / 2
        is_won[:, is_own] = 0
        return np.asarray(((weights @ is_won.T) * weights[:, is_own]).sum(axis=1))
    distinct, ranks = np.unique(scores, return_inverse=True)
    # One pass counts, for each distinct score, the rows of other labels (even cell) and of this
    # label (odd cell).
    counts = _group_sums(weights, 2 * ranks + is_own, 2 * len(distinct))
    others = counts[:, 0::2]
    own = counts[:, 1::2]
    return np.asarray((own * (others.cumsum(axis=1) - others / 2)).sum(axis=1))


def ece(probabilities: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the expected calibration error: the gap between confidence and accuracy, from 0 to 1.

    Equation 3 of Guo et al. (2017), "On Calibration of Modern Neural Networks". Confidence is the
    probability of the most probable label. A bin includes its upper edge. Noise in a bin only adds
    to the gap, so the error is biased upward on few rows, and more so on a resample. The interval
    of a well calibrated classifier can lie above the value.
    """
    confidence = probabilities.max(axis=1)
    inner_edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    bins = np.searchsorted(inner_edges, confidence, side="left")
    gaps = (probabilities.argmax(axis=1) == labels) - confidence
    bin_gaps = np.abs(_group_sums(weights * gaps, bins, NUM_BINS))
    return np.asarray(bin_gaps.sum(axis=1) / weights.sum(axis=1))


METRICS = {
    metric.name: metric
    for metric in (
        ClassificationMetric("accuracy", accuracy),
        ClassificationMetric("macro_f1", macro_f1),
        ClassificationMetric("mcc", mcc, needs_two_labels=True),
        ClassificationMetric("log_loss", log_loss, greater_is_better=False),
        ClassificationMetric(
            "auroc", auroc, undefined_if="the rows hold one label only", needs_two_labels=True
        ),
        ClassificationMetric("ece", ece, greater_is_better=False),
    )
}


def score(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float = 1.0,
    names: Collection[str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score a classifier by metrics, each with a percentile bootstrap interval over the rows.

    All metrics use the same resamples. If a metric is undefined, its interval holds None and a note
    that says why.

    Args:
        logits: Shape (num_rows, num_labels), at least two labels.
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).
        temperature: The logits are divided by it before softmax.
        names: Keys of `METRICS`; all by default.
        confidence: Share of the resamples inside each interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        ModelError: The logits have another shape or are not finite, or the temperature is not
            positive.
        DataError: There are no rows, or the labels do not fit the logits.
        RecipeError: `confidence` or `num_resamples` is out of range, or a name is not in `METRICS`.
    """
    metrics = [find_metric(name) for name in (METRICS if names is None else names)]
    logits, labels = check_scores(logits, labels)
    probabilities = softmax(logits, temperature=temperature)
    return score_metrics(
        metrics,
        probabilities,
        labels,
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )


def score_calibrated(
    logits: ArrayLike, labels: ArrayLike, *, calibration: Mapping[str, Any] | None
) -> dict[str, Interval]:
    """Score a classifier by every metric, and by the calibrated ones at its temperature.

    Args:
        logits: The logits of the model, shape (num_rows, num_labels).
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).
        calibration: The card's `{"temperature": ..}`. None means an adapter without calibration:
            the two calibrated metrics are left out.

    Raises:
        ModelError: The logits have another shape or are not finite, or the temperature is not
            positive.
        DataError: There are no rows, or the labels do not fit the logits.
    """
    intervals = score(logits, labels)
    if calibration is not None:
        calibrated = score(logits, labels, temperature=calibration["temperature"], names=CALIBRATED)
        for name, interval in calibrated.items():
            intervals[f"calibrated_{name}"] = interval
    return intervals


def quick_score(logits: ArrayLike, labels: ArrayLike, metric_name: str) -> float:
    """Score a classifier by one metric, without an interval, as an evaluation during training does.

    Args:
        logits: Shape (num_rows, num_labels), at least two labels.
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).
        metric_name: A key of `METRICS`.

    Raises:
        RecipeError: There is no metric of that name.
        ModelError: The logits have another shape or are not finite.
        DataError: There are no rows, the labels do not fit the logits, or the metric is undefined
            on these rows.
    """
    metric = find_metric(metric_name)
    logits, labels = check_scores(logits, labels)
    value = metric.value(softmax(logits), labels)
    if np.isnan(value):
        raise DataError(
            f"{metric_name} has no value: {metric.undefined_if}; add rows or choose another metric"
        )
    return value


def find_metric(name: str) -> ClassificationMetric:
    """Return the metric of a name.

    Raises:
        RecipeError: There is none.
    """
    if name not in METRICS:
        hint = did_you_mean(name, list(METRICS))
        raise RecipeError(f"{name!r} is no metric; choose from {', '.join(METRICS)}{hint}")
    return METRICS[name]


def check_metric(name: str, *, labels: Integers, names: Sequence[str]) -> None:
    """Refuse a metric that cannot tell one checkpoint from another.

    Args:
        name: A key of `METRICS`.
        labels: Labels of the validation rows, shape (num_rows,).
        names: Label names in order.

    Raises:
        RecipeError: There is no metric of that name.
        DataError: The metric needs two labels, and the rows hold one.
    """
    present = np.unique(labels)
    if not find_metric(name).needs_two_labels or len(present) >= 2:
        return
    missing = [show(name) for i, name in enumerate(names) if i not in present]
    usable = [metric.name for metric in METRICS.values() if not metric.needs_two_labels]
    raise DataError(
        f"validation: all {len(labels):,} rows have the label {show(names[present[0]])}, none has "
        f"{', '.join(missing)}, so {name} cannot choose the best model; add validation rows with "
        "another label",
        advice={"train.metric_for_best_model": f", or set {{}} to {', '.join(usable)}"},
    )


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_labels: int) -> Integers:
    """Count the rows by true and predicted label: (num_labels, num_labels).

    Raises:
        DataError: Labels and predictions are no integers from 0 to num_labels - 1, or differ in
            number.
    """
    truth = check_labels(labels, name="labels", num_labels=num_labels)
    predicted = check_labels(predictions, name="predictions", num_labels=num_labels)
    if len(truth) != len(predicted):
        raise DataError(
            f"found {len(truth)} labels and {len(predicted)} predictions; give one of each per row"
        )
    counts = np.bincount(num_labels * truth + predicted, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def _weighted_means(amounts: Floats | NDArray[np.bool_], weights: Floats) -> Floats:
    return np.asarray(weights @ amounts / weights.sum(axis=1))


def _group_sums(weights: Floats, groups: Integers, num_groups: int) -> Floats:
    """Add up the weights of each resample by group: (num_resamples, num_groups)."""
    return np.stack([np.bincount(groups, weights=row, minlength=num_groups) for row in weights])
