"""One label for each text: the training loss, probabilities and their calibration.

Importing this module does not import torch: a classifier saved as ONNX answers without torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_sentiment.errors import DataError, RecipeError, one_line, show, show_names
from lora_sentiment.evaluation.metric import Metric
from lora_sentiment.evaluation.statistics import Interval, mcnemar, paired_bootstrap
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks.label_sets import LABEL_SCORES
from lora_sentiment.tasks.label_values import (
    UNKNOWN,
    Fault,
    explain_label,
    find_names,
    index_labels,
    rename,
)
from lora_sentiment.tasks.scores import check_scores, softmax
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

TEMPERATURE_BOUNDS = (0.1, 10.0)
"""Lowest and highest temperature. If every validation row is right, the best fit would be
certainty."""


def loss_sum(
    logits: "torch.Tensor",
    labels: "torch.Tensor",
    *,
    class_weights: "torch.Tensor | None" = None,
    label_smoothing: float = 0.0,
) -> "torch.Tensor":
    """Return the cross-entropy summed over the rows, in fp32.

    The sum over all micro-batches, divided by the `total_weight` of the optimizer step, is the mean
    loss of the step. The mean of the means of unequal micro-batches is not.

    Args:
        logits: Shape (num_rows, num_labels).
        labels: Shape (num_rows,).
        class_weights: Weight of each label in fp32, shape (num_labels,). None means 1 for each
            label.
        label_smoothing: Share of the target that is spread over all labels, each part weighted by
            its own label.
    """
    from torch.nn import functional as F  # late: labels are read without torch

    return F.cross_entropy(
        logits.float(),
        labels,
        weight=class_weights,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def total_weight(labels: NDArray[np.int64], class_weights: NDArray[np.float32] | None) -> float:
    """Return the sum of the weights of the rows, by which the summed loss of a step is divided."""
    if class_weights is None:
        return float(len(labels))
    return float(class_weights[labels].sum(dtype=np.float64))


def make_class_weights(
    setting: Literal["balanced"] | tuple[float, ...] | None,
    *,
    labels: NDArray[np.int64],
    names: Sequence[str],
) -> NDArray[np.float32] | None:
    """Return the weight of each label, or None if each weighs 1.

    Args:
        setting: The recipe's `train.class_weights`. `balanced` means num_rows / (num_labels * rows
            of the label), after King & Zeng (2001), "Logistic Regression in Rare Events Data", as
            scikit-learn defines it.
        labels: Labels of the training rows, shape (num_rows,).
        names: Label names in order.

    Raises:
        RecipeError: The list does not hold one weight for each label.
        DataError: The setting is `balanced` and a label has no training row.
    """
    if setting is None:
        return None
    if setting != "balanced":
        if len(setting) != len(names):
            raise RecipeError(
                f"train.class_weights: found {len(setting)} weights; give one for each of the "
                f"{len(names)} labels, in this order: {', '.join(names)}"
            )
        return np.array(setting, dtype=np.float32)
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        unused = ", ".join(show(names[int(label)]) for label in np.flatnonzero(counts == 0))
        raise DataError(
            f"train.class_weights=balanced: no training row has the label {unused}; add rows with "
            "it, or give a list of weights"
        )
    return np.asarray(len(labels) / (len(names) * counts), dtype=np.float32)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the temperature within TEMPERATURE_BOUNDS that gives these rows the lowest log loss.

    The logits are divided by the temperature before softmax: section 4.2 of Guo et al. (2017), "On
    Calibration of Modern Neural Networks". The log loss is convex in 1 / temperature, with the
    slope mean(expected logit - logit of the right label). Its minimum is where the slope crosses
    zero, or a bound. If all logits are equal, the result is 1.

    Args:
        logits: Logits of rows that were not trained on, shape (num_rows, num_labels).
        labels: Integers from 0 to num_labels - 1, shape (num_rows,).

    Raises:
        ModelError: The logits have another shape or are not finite.
        DataError: There are no rows, or the labels do not fit the logits.
    """
    from scipy.optimize import brentq  # slow to import, and only training needs it

    logits, labels = check_scores(logits, labels)
    right_logits = logits[np.arange(len(labels)), labels]
    # Relative to the logit of the right label, so that the slope of a row of equal logits is
    # exactly zero.
    gaps = logits - right_logits[:, None]

    def slope(inverse: float) -> float:
        return float((softmax(gaps, temperature=1 / inverse) * gaps).sum(axis=1).mean())

    lowest, highest = TEMPERATURE_BOUNDS
    slope_at_lowest = slope(1 / lowest)
    slope_at_highest = slope(1 / highest)
    if slope_at_lowest == slope_at_highest == 0:
        return 1.0
    if slope_at_lowest <= 0:
        return lowest
    if slope_at_highest >= 0:
        return highest
    return 1 / float(brentq(slope, 1 / highest, 1 / lowest, xtol=1e-12))


class CrossEntropy(Objective):
    """Cross-entropy, weighted by label if the recipe says so."""

    def __init__(
        self, class_weights: NDArray[np.float32] | None, smoothing: float, device: "torch.device"
    ) -> None:
        import torch  # late: labels are read without torch

        self.class_weights = class_weights
        self.smoothing = smoothing
        self.device_weights = None
        if class_weights is not None:
            self.device_weights = torch.from_numpy(class_weights).to(device)

    def loss_sum(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        return loss_sum(
            logits, labels, class_weights=self.device_weights, label_smoothing=self.smoothing
        )

    def total_weight(self, labels: Labels) -> float:
        return total_weight(labels, self.class_weights)


class SingleLabel(Task):
    """One label for each text."""

    name = "single_label"
    problem_type = "single_label_classification"
    shown = ("accuracy", "macro_f1", "log_loss")
    evaluated = ("accuracy", "log_loss")
    picture = "confusion.png"
    picture_text = "confusion matrix"
    answer_columns: Mapping[str, type] = {"label": str, "score": float}
    test = ("mcnemar", "McNemar")
    hub_metrics: Mapping[str, str] = {
        "accuracy": "accuracy",
        "macro_f1": "f1",
        "mcc": "matthews_correlation",
        "auroc": "roc_auc",
    }

    @property
    def head_type(self) -> str | None:
        return None

    def get_decisive(self, calibration: Calibration | None) -> list[Any]:
        # A temperature alone changes no decision, and older versions hashed nothing of a task.
        return [calibration] if LABEL_SCORES in (calibration or {}) else []

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
        if own_names and names and own_names != names:
            is_ordered = config.labels is not None
            values = rename(values, own_names, names, where, is_ordered=is_ordered)
        names = names or own_names or find_names(values, where, num_files=num_files)
        is_ordered = config.labels is not None or own_names is not None
        labels = index_labels(values, names, where, is_ordered=is_ordered)
        faults = {}
        explained: dict[str, Fault] = {}
        for position in np.flatnonzero(labels == UNKNOWN).tolist():
            key = repr(values[position])
            if key not in explained:
                explained[key] = explain_label(values[position], names, config.label_column)
            faults[position] = explained[key]
        return ReadLabels(names, labels, faults)

    def are_hidden(self, values: list[Any], names: Sequence[str]) -> bool:
        return "-1" not in names and all(value in (-1, "-1") for value in values)

    def check_train(self, labels: Labels, names: Sequence[str], config: DataConfig) -> str | None:
        if len(np.unique(labels)) >= 2:
            return None
        return (
            f"rows 1 to {len(labels):,}, column {config.label_column!r}: every row has the label "
            f"{show(names[labels[0]])}; a classifier needs two labels"
        )

    def find_occurrences(self, labels: Labels) -> tuple[Integers, Integers]:
        return np.arange(len(labels)), labels

    def find_strata(self, labels: Labels) -> Integers:
        return labels

    def make_toy_labels(self, num_rows: int, num_labels: int) -> Labels:
        return np.arange(num_rows, dtype=np.int64) % num_labels

    def make_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str], device: "torch.device"
    ) -> Objective:
        weights = make_class_weights(config.class_weights, labels=labels, names=names)
        return CrossEntropy(weights, config.label_smoothing_factor, device)

    def describe_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str]
    ) -> str | None:
        weights = make_class_weights(config.class_weights, labels=labels, names=names)
        if weights is None:
            return None
        pairs = zip(names, weights, strict=True)
        shown = [f"{one_line(name, limit=40)} {weight:.3g}" for name, weight in pairs]
        return f"class weights: {show_names(shown)}"

    def calibrate(
        self, logits: NDArray[np.float32], labels: Labels, names: Sequence[str]
    ) -> tuple[Calibration | None, str]:
        temperature = fit_temperature(logits, labels)
        lowest, highest = TEMPERATURE_BOUNDS
        shown = f"temperature fitted on validation: {temperature:.3f}, within {lowest} to {highest}"
        if temperature == lowest:  # nearly all of validation is right
            shown += "; it is the lowest, so do not rely on calibrated probabilities"
        return {"temperature": temperature}, shown

    def check_answers(self, names: Sequence[str], calibration: Calibration | None) -> str | None:
        scores: Any = (calibration or {}).get(LABEL_SCORES, [[]] * len(names))
        if not isinstance(scores, list) or list(map(type, scores)) != [list] * len(names):
            return f"{LABEL_SCORES}: allowed: one list of numbers for each of {len(names)} labels"
        return super().check_answers(names, calibration)

    def compute_scores(self, logits: NDArray[np.floating], *, temperature: float = 1.0) -> Floats:
        return softmax(logits, temperature=temperature)

    def make_answer(
        self, scores: Floats, names: Sequence[str], calibration: Calibration | None
    ) -> dict[str, Any]:
        best = int(scores.argmax())
        return {"label": names[best], "score": float(scores[best])}

    def show_answer(self, answer: Mapping[str, Any]) -> str:
        return f"{one_line(str(answer['label']))}\t{answer['score']:.4f}"

    def count_answers(
        self, columns: Mapping[str, Sequence[Any]], names: Sequence[str]
    ) -> dict[str, int]:
        labels = list(columns["label"])
        return {name: labels.count(name) for name in names}

    def find_flips(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        calibration: Calibration | None,
    ) -> NDArray[np.bool_]:
        return np.asarray(before.argmax(axis=1) != after.argmax(axis=1))

    def find_right(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> NDArray[np.bool_] | None:
        return np.asarray(logits.argmax(axis=1) == labels)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        # Late: `evaluate` takes seconds, and answers need no metric.
        from lora_sentiment.tasks.metrics import METRICS

        return METRICS

    def score(
        self,
        logits: NDArray[np.floating],
        labels: Labels,
        *,
        names: Sequence[str],
        calibration: Calibration | None,
    ) -> dict[str, Interval]:
        from lora_sentiment.tasks.metrics import score_calibrated  # late: as in `metrics`

        return score_calibrated(logits, labels, calibration=calibration)

    def make_metric_scores(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> Floats:
        checked, _ = check_scores(logits, labels)
        return softmax(checked)

    def check_metric(self, name: str, *, labels: Labels, names: Sequence[str]) -> None:
        from lora_sentiment.tasks.metrics import check_metric  # late: as in `metrics`

        check_metric(name, labels=labels, names=names)

    def compare_runs(
        self,
        own: tuple[NDArray[np.float32], Calibration | None],
        other: tuple[NDArray[np.float32], Calibration | None],
        labels: Labels,
    ) -> tuple[Interval, float]:
        is_right = own[0].argmax(axis=1) == labels
        other_is_right = other[0].argmax(axis=1) == labels
        difference = paired_bootstrap(is_right, other_is_right)
        return difference, mcnemar(is_right, other_is_right)

    def narrow(
        self, run: tuple[NDArray[np.float32], Calibration | None], labels: Labels, num_labels: int
    ) -> tuple[tuple[NDArray[np.float32], Calibration | None], Labels]:
        is_known = labels < num_labels
        return (run[0][is_known], run[1]), labels[is_known]

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
        from lora_sentiment.evaluation.plots import plot_confusion  # late: matplotlib
        from lora_sentiment.tasks.metrics import confusion_matrix

        matrix = confusion_matrix(labels, logits.argmax(axis=1), len(names))
        plot_confusion(matrix, path, labels=names, title=title)

    def describe_calibration(self, calibration: Calibration, names: Iterable[str]) -> str:
        return (
            f" The temperature {calibration['temperature']:.3f} was fitted on validation and is kept in "
            "`card.json`. Logits divided by it give `calibrated_log_loss` and `calibrated_ece`, which "
            "flatter on validation itself. No decision changes."
        )
