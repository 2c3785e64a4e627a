"""A metric of rows, and its bootstrap interval."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.evaluation.statistics import Interval, percentile_interval, resample_weights

Floats = NDArray[np.float64]
Formula = Callable[[Floats, Any, Floats], Floats]
"""(scores, labels, weights) -> the metric of each resample, nan where it is undefined:
(num_resamples,).

Scores are (num_rows, num_labels), labels those of the task. Weights are (num_resamples, num_rows):
how often each resample holds each row. No resample is empty.
"""


class Metric:
    """A formula of scores and labels.

    Attributes:
        name: Its key in `report.json`. `train.metric_for_best_model` lists the names it takes.
        values: The formula.
        greater_is_better: Whether the best checkpoint has the highest value.
        undefined_if: When the formula gives nan, in words for the report.
        needs_two_labels: Whether all models are equal on rows that hold one label only.
    """

    name = ""

    def __init__(
        self,
        name: str,
        values: Formula,
        *,
        greater_is_better: bool = True,
        undefined_if: str = "",
        needs_two_labels: bool = False,
    ) -> None:
        self.name = name
        self.values = values
        self.greater_is_better = greater_is_better
        self.undefined_if = undefined_if
        self.needs_two_labels = needs_two_labels

    def value(self, scores: Floats, labels: NDArray[Any]) -> float:
        """Return the metric of all rows, each counted once."""
        return float(self.values(scores, labels, np.ones((1, len(labels))))[0])


def show_metric(name: str) -> str:
    """Return the name of a metric for people: `log_loss` is log-loss."""
    return name.replace("_", "-").replace("f1", "F1")


def score_metrics(
    metrics: Sequence[Metric],
    scores: Floats,
    labels: NDArray[Any],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Score rows by metrics, each with a percentile bootstrap interval over the rows.

    All metrics use the same resamples. If a metric is undefined, its interval holds None and a note
    that says why.

    Args:
        metrics: The metrics.
        scores: Shape (num_rows, num_labels).
        labels: The labels of the rows.
        confidence: Share of the resamples inside each interval.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Raises:
        DataError: There are no rows.
        RecipeError: `confidence` or `num_resamples` is out of range.
    """
    resampled: dict[str, list[Floats]] = {metric.name: [] for metric in metrics}
    for weights in resample_weights(len(labels), num_resamples=num_resamples, seed=seed):
        for metric in metrics:
            resampled[metric.name].append(metric.values(scores, labels, weights))
    intervals = {}
    for metric in metrics:
        intervals[metric.name] = percentile_interval(
            metric.value(scores, labels),
            np.concatenate(resampled[metric.name]),
            confidence=confidence,
            undefined_if=metric.undefined_if,
        )
    return intervals
