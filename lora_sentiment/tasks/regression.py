"""A number for each text, such as stars."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import DataError, ModelError, one_line, show
from lora_sentiment.evaluation.metric import Metric, score_metrics
from lora_sentiment.evaluation.statistics import Interval, paired_metric_bootstrap
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks.label_values import Fault
from lora_sentiment.tasks.scores import check_finite
from lora_sentiment.tasks.task import (
    Calibration,
    Floats,
    Integers,
    Labels,
    Objective,
    ReadLabels,
    Task,
)

if TYPE_CHECKING:
    import torch

NUM_STRATA = 10
"""Strata of equal size of a carved split or a sample, where there are more different values."""
MAX_GRADES = 100
"""Most different whole numbers that count as grades, for the weighted kappa."""
FLIP = 0.05
"""Difference of a value from which on two forms of a model answer differently, in units of
max(1, standard deviation of the values)."""


class ScaledError(Objective):
    """Squared or Huber error of values in units of the training rows' deviation from their mean.

    Attributes:
        mean: Mean of the training labels.
        deviation: Standard deviation of the training labels.
        huber_delta: Error from which on the loss is linear, in deviations. None means squared.
    """

    def __init__(self, labels: Floats, huber_delta: float | None) -> None:
        self.mean = float(labels.mean())
        self.deviation = float(labels.std())
        self.huber_delta = huber_delta

    def loss_sum(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        import torch  # late: labels are read without torch
        from torch.nn import functional as F

        # A missing row of a packed micro-batch has the label nan.
        is_row = ~torch.isnan(labels)
        known = torch.where(is_row, labels, torch.full_like(labels, self.mean))
        targets = ((known - self.mean) / self.deviation).float()
        values = logits.float().squeeze(1)
        if self.huber_delta is None:
            losses = F.mse_loss(values, targets, reduction="none")
        else:
            losses = F.huber_loss(values, targets, reduction="none", delta=self.huber_delta)
        return (losses * is_row).sum()

    def to_units(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(logits * self.deviation + self.mean, dtype=np.float32)

    def fold_into(self, layer: "torch.nn.Linear") -> None:
        import torch  # late: as above

        with torch.no_grad():
            layer.weight.mul_(self.deviation)
            layer.bias.mul_(self.deviation).add_(self.mean)

    def unfold_from(self, layer: "torch.nn.Linear") -> None:
        import torch  # late: as above

        with torch.no_grad():
            layer.weight.div_(self.deviation)
            layer.bias.sub_(self.mean).div_(self.deviation)


class Regression(Task):
    """A number for each text."""

    name = "regression"
    problem_type = "regression"
    activation = "none"
    has_wrong_labels = False
    shown = ("mae", "spearman", "rmse")
    evaluated = ("mae", "rmse")
    kind = "regression to the number {labels}"
    limits = "Every text gets a number, fitting or not, and numbers beyond those of training too."
    trust = "A value comes without an interval of its own; `rmse` above says how far to trust it."
    in_percent = False
    picture = "values.png"
    picture_text = "predicted and true values"
    answer_columns: Mapping[str, type] = {"value": float}
    test = ("wilcoxon", "Wilcoxon's signed-rank test of absolute errors")
    hub_metrics: Mapping[str, str] = {"mae": "mae", "rmse": "rmse", "spearman": "spearmanr"}

    # Labels

    def read(
        self,
        values: list[Any],
        config: DataConfig,
        *,
        names: tuple[str, ...] | None,
        own_names: tuple[str, ...] | None,
        where: str,
        num_files: int,
    ) -> ReadLabels:
        labels = np.full(len(values), np.nan)
        faults: dict[int, Fault] = {}
        column = config.label_column
        for position, value in enumerate(values):
            number = _read_number(value)
            if number is not None:
                labels[position] = number
                continue
            is_nan = isinstance(value, float) and value != value
            if value is None or is_nan or (isinstance(value, str) and not value.strip()):
                faults[position] = Fault("label is missing", f"column {column!r}: is missing")
            else:
                message = f"column {column!r}: found {show(value)}; allowed: a finite number"
                faults[position] = Fault("label is no number", message)
        return ReadLabels(names or (column,), labels, faults)

    def count_outputs(self, config: DataConfig) -> int | None:
        return 1

    def check_train(self, labels: Labels, names: Sequence[str], config: DataConfig) -> str | None:
        if len(np.unique(labels)) >= 2:
            return None
        return (
            f"rows 1 to {len(labels):,}, column {names[0]!r}: every value is {labels[0]:g}; a "
            "regression needs different values"
        )

    def find_occurrences(self, labels: Labels) -> tuple[Integers, Integers]:
        # Numbers are no labels that a part of the rows could lack.
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing

    def count_labels(self, labels: Labels, names: Sequence[str]) -> dict[str, int]:
        return {}

    def describe_labels(self, labels: Labels, names: Sequence[str]) -> dict[str, Any]:
        facts = {
            "mean": labels.mean(),
            "deviation": labels.std(),
            "lowest": labels.min(),
            "highest": labels.max(),
        }
        return {"labels": {}, "values": {name: float(value) for name, value in facts.items()}}

    def find_strata(self, labels: Labels) -> Integers:
        distinct, strata = np.unique(labels, return_inverse=True)
        if len(distinct) <= NUM_STRATA:
            return np.asarray(strata, dtype=np.int64)
        edges = np.quantile(labels, np.linspace(0, 1, NUM_STRATA + 1)[1:-1])
        return np.searchsorted(edges, labels, side="right").astype(np.int64)

    def choose_texts(
        self, labels: Labels, sizes: Integers, *, fraction: float, generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        # Strata may have too few rows to give a share each. So what one gives too little or too
        # much is carried on to the next.
        is_chosen = np.zeros(len(labels), dtype=bool)
        missing = generator.uniform(-0.5, 0.5)  # else the only row of a stratum goes one way
        order = np.lexsort((generator.permutation(len(labels)), self.find_strata(labels)))
        for text in order.tolist():
            missing += fraction * sizes[text]
            if missing >= sizes[text] / 2:
                is_chosen[text] = True
                missing -= sizes[text]
        return is_chosen

    def make_toy_labels(self, num_rows: int, num_labels: int) -> Labels:
        return np.arange(num_rows, dtype=np.float64) % 5

    # Training

    def make_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str], device: "torch.device"
    ) -> Objective:
        return ScaledError(labels, config.huber_delta)

    def describe_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str]
    ) -> str | None:
        objective = ScaledError(labels, config.huber_delta)
        kind = "squared" if config.huber_delta is None else "Huber"
        return (
            f"{kind} error of {one_line(names[0], limit=40)} in units of the training rows: mean "
            f"{objective.mean:.4g}, standard deviation {objective.deviation:.4g}"
        )

    # Answers

    def check_answers(self, names: Sequence[str], calibration: Calibration | None) -> str | None:
        if len(names) == 1 and names[0]:
            return None
        return f"labels: found {list(names)}; a regression has one, the name of its value"

    def compute_scores(self, logits: NDArray[np.floating], *, temperature: float = 1.0) -> Floats:
        if temperature != 1.0:
            raise ModelError("a regression has no temperature")
        return np.asarray(logits, dtype=np.float64)

    def make_answer(
        self, scores: Floats, names: Sequence[str], calibration: Calibration | None
    ) -> dict[str, Any]:
        return {"value": float(scores[0])}

    def show_answer(self, answer: Mapping[str, Any]) -> str:
        return f"{answer['value']:.4f}"

    def count_answers(
        self, columns: Mapping[str, Sequence[Any]], names: Sequence[str]
    ) -> dict[str, int]:
        return {}

    def find_flips(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        calibration: Calibration | None,
    ) -> NDArray[np.bool_]:
        allowed = self.find_allowed_difference(before, FLIP)
        # The comparison is false for nan, which is another answer too.
        return np.asarray(~(np.abs(after - before)[:, 0] <= allowed))

    def find_allowed_difference(self, logits: NDArray[np.floating], tolerance: float) -> float:
        # Real units may be thousands, of which fp32 has seven digits.
        return tolerance * max(1.0, float(np.std(logits)), float(np.abs(logits).max()) / 100)

    # Scores

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def score(
        self,
        logits: NDArray[np.floating],
        labels: Labels,
        *,
        names: Sequence[str],
        calibration: Calibration | None,
    ) -> dict[str, Interval]:
        intervals = super().score(logits, labels, names=names, calibration=calibration)
        grades = np.unique(labels)
        if len(grades) <= MAX_GRADES and (grades == np.round(grades)).all():
            kappa = Metric("quadratic_kappa", _quadratic_kappa, undefined_if="all values are one")
            scores = self.make_metric_scores(logits, labels, calibration)
            intervals |= score_metrics([kappa], scores, labels)
        return intervals

    def make_metric_scores(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> Floats:
        values = check_finite(logits, labels)
        if values.shape[1] != 1 or labels.ndim != 1:
            raise DataError(
                f"found logits of shape {values.shape} and labels of shape {labels.shape}; give "
                "one number for each row"
            )
        return values

    def check_metric(self, name: str, *, labels: Labels, names: Sequence[str]) -> None:
        if self.find_metric(name).needs_two_labels and len(np.unique(labels)) < 2:
            raise DataError(
                f"validation: every value of {names[0]!r} is {labels[0]:g}, so {name} cannot choose "
                "the best model; add validation rows with other values",
                advice={"train.metric_for_best_model": ", or set {} to mae, rmse"},
            )

    def compare_runs(
        self,
        own: tuple[NDArray[np.float32], Calibration | None],
        other: tuple[NDArray[np.float32], Calibration | None],
        labels: Labels,
    ) -> tuple[Interval, float]:
        from scipy.stats import wilcoxon  # slow to import, and only `compare` needs it

        scores = [self.make_metric_scores(run[0], labels, None) for run in (own, other)]
        difference = paired_metric_bootstrap(_mae, scores[0], scores[1], labels)
        errors = [np.abs(one[:, 0] - labels) for one in scores]
        if np.array_equal(errors[0], errors[1]):
            return difference, 1.0
        return difference, float(wilcoxon(errors[0], errors[1]).pvalue)

    # Pictures and cards

    def draw(
        self,
        logits: NDArray[np.float32],
        labels: Labels,
        path: Path,
        *,
        names: Sequence[str],
        title: str,
        calibration: Calibration | None,
    ) -> None:
        from lora_sentiment.evaluation.plots import plot_values  # late: matplotlib

        plot_values(labels, logits[:, 0], path, name=names[0], title=title)

    def describe_calibration(self, calibration: Calibration, names: Iterable[str]) -> str:
        return ""


def _read_number(value: Any) -> float | None:
    """Return a value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:
        return None  # Python alone reads it as a number
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# Metrics. Scores are values, (num_rows, 1).


def _mean(amounts: Floats, weights: Floats) -> Floats:
    return np.asarray(weights @ amounts / weights.sum(axis=1))


def _mae(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return the mean absolute error."""
    return _mean(np.abs(scores[:, 0] - labels), weights)


def _rmse(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return the root of the mean squared error."""
    return np.asarray(np.sqrt(_mean((scores[:, 0] - labels) ** 2, weights)))


def _r2(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return the coefficient of determination: 1 minus squared error over variance."""
    variance = _mean(labels**2, weights) - _mean(labels, weights) ** 2
    error = _mean((scores[:, 0] - labels) ** 2, weights)
    undefined = np.full(len(weights), np.nan)
    return np.asarray(1 - np.divide(error, variance, out=undefined, where=variance > 1e-12))


def _correlate(one: Floats, other: Floats, weights: Floats) -> Floats:
    """Return the weighted correlation of each resample, nan where one side is constant.

    Args:
        one: Shape (num_rows,) or (num_resamples, num_rows).
        other: As `one`.
        weights: Shape (num_resamples, num_rows).
    """
    totals = weights.sum(axis=1, keepdims=True)
    one = one - (weights * one).sum(axis=1, keepdims=True) / totals
    other = other - (weights * other).sum(axis=1, keepdims=True) / totals
    covariance = (weights * one * other).sum(axis=1)
    scale = np.sqrt((weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1))
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(covariance, scale, out=undefined, where=scale > 1e-12))


def _pearson(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return Pearson's correlation."""
    return _correlate(scores[:, 0], labels, weights)


def _spearman(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return Spearman's correlation: Pearson's of the ranks, equal values sharing their mean."""
    return _correlate(_rank(scores[:, 0], weights), _rank(labels, weights), weights)


def _rank(values: Floats, weights: Floats) -> Floats:
    """Return the rank of each row in each resample, (num_resamples, num_rows)."""
    distinct, places = np.unique(values, return_inverse=True)
    counts = np.zeros((len(weights), len(distinct)))
    for own, row in zip(counts, weights, strict=True):
        own[:] = np.bincount(places, weights=row, minlength=len(distinct))
    return np.asarray((counts.cumsum(axis=1) - counts / 2)[:, places])


def _quadratic_kappa(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """Return the kappa of whole numbers with quadratic weights, of values rounded to the grades.

    Cohen (1968), "Weighted kappa": 1 minus the mean squared distance over that of independent
    truth and answer with the same shares.
    """
    grades = np.clip(np.round(scores[:, 0]), labels.min(), labels.max())
    observed = _mean((grades - labels) ** 2, weights)
    means = _mean(grades, weights), _mean(labels, weights)
    squares = _mean(grades**2, weights) + _mean(labels**2, weights)
    expected = squares - 2 * means[0] * means[1]
    undefined = np.full(len(weights), np.nan)
    return np.asarray(1 - np.divide(observed, expected, out=undefined, where=expected > 1e-12))


_CONSTANT = "all values are equal"
METRICS = {
    metric.name: metric
    for metric in (
        Metric("mae", _mae, greater_is_better=False),
        Metric("rmse", _rmse, greater_is_better=False),
        Metric("r2", _r2, undefined_if=_CONSTANT, needs_two_labels=True),
        Metric("pearson", _pearson, undefined_if=_CONSTANT, needs_two_labels=True),
        Metric("spearman", _spearman, undefined_if=_CONSTANT, needs_two_labels=True),
    )
}
