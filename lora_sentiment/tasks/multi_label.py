"""Any number of labels for each text, none included."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.cleaning import strip_blanks
from lora_sentiment.errors import DataError, ModelError, RecipeError, one_line, show, show_names
from lora_sentiment.evaluation.metric import Metric, score_metrics
from lora_sentiment.evaluation.statistics import Interval, mcnemar, paired_metric_bootstrap
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks.label_values import Fault, find_names, label_text, list_names
from lora_sentiment.tasks.scores import check_finite, sigmoid
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

DEFAULT_THRESHOLD = 0.5
"""Probability from which on a label is given where no validation rows chose another."""
NUM_BINS = 15
"""Bins of the expected calibration error."""
SEPARATOR = ", "
"""Separates the labels of an answer in one cell."""
ONE = ("1", "1.0", "true")
ZERO = ("0", "0.0", "false")
"""The cells of a label column, in small letters."""


class BinaryCrossEntropy(Objective):
    """The mean over labels of each label's binary cross-entropy.

    Attributes:
        weights: Weight of each label in a row without it and in a row with it, (2, num_labels), or
            None if all weigh 1.
    """

    def __init__(
        self, weights: NDArray[np.float32] | None, smoothing: float, device: "torch.device"
    ) -> None:
        import torch  # late: labels are read without torch

        self.weights = weights
        self.smoothing = smoothing
        self.device_weights = None if weights is None else torch.from_numpy(weights).to(device)

    def loss_sum(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        from torch.nn import functional as F  # late: as above

        # A missing row of a packed micro-batch has negative labels.
        is_row = (labels >= 0).float()
        truth = labels.clamp(min=0)
        targets = truth * (1 - self.smoothing) + self.smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
        if self.device_weights is not None:
            without, with_label = self.device_weights
            losses = losses * (without + truth * (with_label - without))
        return (losses * is_row).mean(dim=1).sum()

    def total_weight(self, labels: Labels) -> float:
        if self.weights is None:
            return float(len(labels))
        return float(np.where(labels > 0, self.weights[1], self.weights[0]).mean(axis=1).sum())


def make_label_weights(
    setting: Any, *, labels: Integers, names: Sequence[str]
) -> NDArray[np.float32] | None:
    """Return the weight of each label without and with it, or None if each weighs 1.

    Args:
        setting: The recipe's `train.class_weights`. `balanced` lets the rows with and without a
            label weigh alike: num_rows / (2 * rows of either kind). A list has a weight for each
            label.
        labels: Labels of the training rows, (num_rows, num_labels).
        names: Label names in order.

    Returns:
        Shape (2, num_labels).

    Raises:
        RecipeError: The list does not hold one weight for each label.
        DataError: `balanced`, and a label is in no row or in every row.
    """
    if setting is None:
        return None
    if setting != "balanced":
        if len(setting) != len(names):
            raise RecipeError(
                f"train.class_weights: found {len(setting)} weights; give one for each of the "
                f"{len(names)} labels, in this order: {', '.join(names)}"
            )
        return np.array([setting, setting], dtype=np.float32)
    num_with = labels.sum(axis=0)
    counts = np.stack([len(labels) - num_with, num_with])
    lacking = [name for name, own in zip(names, counts.T, strict=True) if not own.all()]
    if lacking:
        raise DataError(
            f"train.class_weights: balanced needs rows with and without each label; not so for "
            f"{show_names(lacking)}; add rows, or leave class_weights out"
        )
    return np.asarray(len(labels) / (2 * counts), dtype=np.float32)


class MultiLabel(Task):
    """Any number of labels for each text."""

    name = "multi_label"
    problem_type = "multi_label_classification"
    activation = "sigmoid"
    shown = ("macro_f1", "average_precision", "log_loss")
    # Thresholds are chosen after training, so F1 means little before.
    evaluated = ("average_precision", "log_loss")
    kind = "classifier that gives a text any number of the labels {labels}"
    limits = "It knows the labels {labels} and no other; a text gets any number of them, or none."
    picture = "labels.png"
    picture_text = "found, missed and wrongly given labels"
    answer_columns: Mapping[str, type] = {"labels": str}
    test = ("mcnemar", "McNemar, on rows with every label right")
    hub_metrics: Mapping[str, str] = {"macro_f1": "f1", "subset_accuracy": "accuracy"}

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
        if config.label_columns:
            return _read_columns(values, config.label_columns)
        if not config.label_separator and any(isinstance(value, str) for value in values):
            raise DataError(
                f"{where}: the label column holds text, but data.label_separator is empty"
            )
        cells: list[list[str]] = []
        faults: dict[int, Fault] = {}
        for position, value in enumerate(values):
            cell = _split_cell(value, config.label_separator, own_names)
            if cell is None:
                kind = f"label is {type(value).__name__}"
                faults[position] = Fault(
                    kind,
                    f"column {config.label_column!r}: found {show(value)}; allowed: a list of "
                    f"labels, or labels with {config.label_separator!r} between them",
                )
            cells.append(cell or [])
        if not names:
            found = [label for cell in cells for label in cell]
            if not found:
                if faults:
                    position, fault = next(iter(faults.items()))
                    raise DataError(f"{where}: row {position + 1}, {fault.message}")
                raise DataError(f"{where}: no row has a label in column {config.label_column!r}")
            names = own_names or find_names(found, where, num_files=num_files)
        index = {name: i for i, name in enumerate(names)}
        labels = np.zeros((len(values), len(names)), dtype=np.int64)
        for position, cell in enumerate(cells):
            for label in cell:
                if label in index:
                    labels[position, index[label]] = 1
                    continue
                message = f"label {show(label)} is none of {list_names(names)}"
                faults.setdefault(
                    position,
                    Fault("label is unknown", f"column {config.label_column!r}: {message}"),
                )
        return ReadLabels(names, labels, faults)

    def check_train(self, labels: Labels, names: Sequence[str], config: DataConfig) -> str | None:
        num_with = labels.sum(axis=0)
        for name, count in zip(names, num_with.tolist(), strict=True):
            if count in (0, len(labels)):
                column = name if config.label_columns else config.label_column
                which = "no row has" if count == 0 else f"all {len(labels):,} rows have"
                return (
                    f"rows 1 to {len(labels):,}, column {column!r}: {which} the label "
                    f"{show(name)}; each label needs rows with it and rows without it: add some, "
                    "or leave the label out"
                )
        return None

    def find_occurrences(self, labels: Labels) -> tuple[Integers, Integers]:
        places, found = np.nonzero(labels)
        return places, found

    def describe_labels(self, labels: Labels, names: Sequence[str]) -> dict[str, Any]:
        num_labels = labels.sum(axis=1)
        return {
            "labels": self.count_labels(labels, names),
            "labels_of_a_row": {
                "none": int((num_labels == 0).sum()),
                "mean": float(num_labels.mean()),
            },
        }

    def find_strata(self, labels: Labels) -> Integers:
        _, sets = np.unique(labels, axis=0, return_inverse=True)
        return np.asarray(sets.reshape(-1), dtype=np.int64)

    def choose_texts(
        self, labels: Labels, sizes: Integers, *, fraction: float, generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        return stratify(labels, sizes, fraction=fraction, generator=generator)

    def make_toy_labels(self, num_rows: int, num_labels: int) -> Labels:
        return (np.arange(num_rows)[:, None] + np.arange(num_labels)) % 2

    # Training

    def make_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str], device: "torch.device"
    ) -> Objective:
        weights = make_label_weights(config.class_weights, labels=labels, names=names)
        return BinaryCrossEntropy(weights, config.label_smoothing_factor, device)

    def describe_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str]
    ) -> str | None:
        weights = make_label_weights(config.class_weights, labels=labels, names=names)
        if weights is None:
            return None
        shown = []
        for name, without, with_label in zip(names, weights[0], weights[1], strict=True):
            shown.append(f"{one_line(name, limit=40)} {with_label:.3g} (without it {without:.3g})")
        return f"class weights: {show_names(shown)}"

    def calibrate(
        self, logits: NDArray[np.float32], labels: Labels, names: Sequence[str]
    ) -> tuple[Calibration | None, str]:
        probabilities = self.make_metric_scores(logits, labels, None)[:, 0]
        thresholds = []
        for scores, truth in zip(probabilities.T, labels.T, strict=True):
            thresholds.append(choose_threshold(scores, truth))
        pairs = zip(names, thresholds, strict=True)
        shown = [f"{one_line(name, limit=40)} {threshold:.3f}" for name, threshold in pairs]
        return (
            {"thresholds": thresholds},
            f"thresholds with the best F1 on validation: {show_names(shown)}",
        )

    # Answers

    def check_answers(self, names: Sequence[str], calibration: Calibration | None) -> str | None:
        thresholds = (calibration or {}).get("thresholds")
        if thresholds is None:
            return super().check_answers(names, calibration)
        numbers = []
        if isinstance(thresholds, list):
            numbers = [number for number in thresholds if isinstance(number, float)]
        if len(numbers) == len(names) and all(0 <= number <= 1 for number in numbers):
            return super().check_answers(names, calibration)
        return f"thresholds: found {thresholds}; allowed: {len(names)} numbers from 0 to 1"

    def compute_scores(self, logits: NDArray[np.floating], *, temperature: float = 1.0) -> Floats:
        if temperature != 1.0:
            raise ModelError("a multi-label model has thresholds and no temperature")
        return sigmoid(logits)

    def make_answer(
        self, scores: Floats, names: Sequence[str], calibration: Calibration | None
    ) -> dict[str, Any]:
        is_given = scores >= get_thresholds(calibration, len(names))
        return {"labels": [names[i] for i in np.flatnonzero(is_given).tolist()]}

    def to_columns(self, answer: Mapping[str, Any]) -> list[Any]:
        return [json.dumps(answer["labels"], ensure_ascii=False)]

    def list_cells(self, names: Sequence[str]) -> list[str]:
        return [json.dumps(list(names), ensure_ascii=False)]

    def show_answer(self, answer: Mapping[str, Any]) -> str:
        return SEPARATOR.join(map(one_line, answer["labels"])) or "(no label)"

    def count_answers(
        self, columns: Mapping[str, Sequence[Any]], names: Sequence[str]
    ) -> dict[str, int]:
        counts = dict.fromkeys(names, 0)
        for cell in columns["labels"]:
            for label in json.loads(cell or "[]"):
                counts[label] += 1
        return counts

    def find_flips(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        calibration: Calibration | None,
    ) -> NDArray[np.bool_]:
        given = decide(sigmoid(before), calibration)
        return np.asarray((given != decide(sigmoid(after), calibration)).any(axis=1))

    def find_right(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> NDArray[np.bool_] | None:
        return np.asarray((decide(sigmoid(logits), calibration) == labels).all(axis=1))

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
        scores = self.make_metric_scores(logits, labels, calibration)
        of_labels = []
        for i, name in enumerate(names):
            formula = partial(_average_precisions, only=[i])
            undefined = f"no row has the label {show(name)}"
            of_labels.append(Metric(f"average_precision/{name}", formula, undefined_if=undefined))
        return intervals | score_metrics(of_labels, scores, labels)

    def make_metric_scores(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> Floats:
        """Return the probabilities and the decisions of 0 and 1, (num_rows, 2, num_labels)."""
        logits = check_finite(logits, labels)
        if labels.shape != logits.shape:
            raise DataError(
                f"found labels of shape {labels.shape} and logits of shape {logits.shape}; give a "
                "0 or 1 for each logit"
            )
        probabilities = sigmoid(logits)
        return np.stack([probabilities, decide(probabilities, calibration)], axis=1)

    def compare_runs(
        self,
        own: tuple[NDArray[np.float32], Calibration | None],
        other: tuple[NDArray[np.float32], Calibration | None],
        labels: Labels,
    ) -> tuple[Interval, float]:
        scores = [self.make_metric_scores(run[0], labels, run[1]) for run in (own, other)]
        difference = paired_metric_bootstrap(_macro_f1, scores[0], scores[1], labels)
        is_right = [(one[:, 1] == labels).all(axis=1) for one in scores]
        return difference, mcnemar(is_right[0], is_right[1])

    def narrow(
        self, run: tuple[NDArray[np.float32], Calibration | None], labels: Labels, num_labels: int
    ) -> tuple[tuple[NDArray[np.float32], Calibration | None], Labels]:
        thresholds = get_thresholds(run[1], run[0].shape[1])[:num_labels]
        calibration: Calibration = {"thresholds": thresholds.tolist()}
        return (run[0][:, :num_labels], calibration), labels[:, :num_labels]

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
        from lora_sentiment.evaluation.plots import plot_labels  # late: matplotlib

        given = decide(sigmoid(logits), calibration)
        plot_labels(
            num_found=(given & (labels > 0)).sum(axis=0),
            num_missed=(~given & (labels > 0)).sum(axis=0),
            num_wrong=(given & (labels == 0)).sum(axis=0),
            path=path,
            labels=names,
            title=title,
        )

    def describe_calibration(self, calibration: Calibration, names: Iterable[str]) -> str:
        thresholds = calibration["thresholds"]
        assert isinstance(thresholds, list)
        pairs = zip(names, thresholds, strict=True)
        shown = show_names([f"{one_line(name)} {threshold:.3f}" for name, threshold in pairs])
        return (
            " A label is given where its probability, the sigmoid of its logit, reaches its "
            f"threshold: {shown}. The thresholds have the best F1 on validation, where they "
            "flatter, and are kept in `card.json`. A stock pipeline gives probabilities alone."
        )


# Labels


def _read_columns(values: list[Any], columns: Sequence[str]) -> ReadLabels:
    """Read one 0/1 column for each label."""
    labels = np.zeros((len(values), len(columns)), dtype=np.int64)
    faults: dict[int, Fault] = {}
    for position, cells in enumerate(values):
        for i, cell in enumerate(cells):
            text = label_text(int(cell)) if isinstance(cell, bool) else str(cell).strip().lower()
            if text in ONE:
                labels[position, i] = 1
            elif text not in ZERO:
                missing = cell is None or text in ("", "nan")
                found = "is missing" if missing else f"found {show(cell)}"
                kind = "label is missing" if missing else "label is neither 0 nor 1"
                message = f"column {columns[i]!r}: {found}; allowed: 0 or 1"
                faults.setdefault(position, Fault(kind, message))
    return ReadLabels(tuple(columns), labels, faults)


def _split_cell(value: Any, separator: str, own_names: tuple[str, ...] | None) -> list[str] | None:
    """Return the labels of a cell, or None if it holds none of the allowed kinds of values."""
    if value is None or (isinstance(value, float) and value != value):
        return []
    if isinstance(value, str) and value.startswith("["):
        # As `predict` writes labels.
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        parts: list[Any] = value.split(separator)
        return [strip_blanks(part) for part in parts if strip_blanks(part)]
    if not isinstance(value, list | tuple):
        return None
    labels = []
    for part in value:
        if own_names and isinstance(part, int) and 0 <= part < len(own_names):
            part = own_names[part]
        label = label_text(part)
        if not label:
            return None
        labels.append(label)
    return labels


def stratify(
    labels: Integers, sizes: Integers, *, fraction: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose texts so that each label keeps its share: iterative stratification.

    Algorithm 1 of Sechidis, Tsoumakas & Vlahavas (2011), "On the Stratification of Multi-Label
    Data", for two parts: the texts of the label with the fewest texts left are dealt first, each to
    the part that lacks this label most, then to the part that lacks rows most. A text weighs as
    many rows as it has.

    Args:
        labels: 0 or 1 for each label of each text, (num_texts, num_labels).
        sizes: Rows of each text, (num_texts,).
        fraction: Share of the rows to choose.
        generator: Draws the order of the texts.

    Returns:
        Whether each text is chosen, (num_texts,).
    """
    shares = np.array([1 - fraction, fraction])
    weights = labels * sizes[:, None]
    # What each of the two parts lacks: rows of each label, and rows.
    lacking = np.outer(shares, weights.sum(axis=0))
    lacking_rows = shares * sizes.sum()
    part_of = np.full(len(labels), -1)
    order = generator.permutation(len(labels))
    while True:
        left = order[part_of[order] < 0]
        num_left = labels[left].sum(axis=0)
        if not num_left.any():
            break
        rarest = int(np.where(num_left > 0, num_left, len(labels) + 1).argmin())
        for text in left[labels[left, rarest] > 0]:
            part = int(lacking[1, rarest] > lacking[0, rarest])
            if lacking[0, rarest] == lacking[1, rarest]:
                part = int(lacking_rows[1] > lacking_rows[0])
            part_of[text] = part
            lacking[part] -= weights[text]
            lacking_rows[part] -= sizes[text]
    for text in order[part_of[order] < 0]:
        part = int(lacking_rows[1] > lacking_rows[0])
        part_of[text] = part
        lacking_rows[part] -= sizes[text]
    return np.asarray(part_of == 1)


# Decisions


def get_thresholds(calibration: Calibration | None, num_labels: int) -> Floats:
    """Return the threshold of each label, (num_labels,)."""
    thresholds = (calibration or {}).get("thresholds", [DEFAULT_THRESHOLD] * num_labels)
    return np.array(thresholds, dtype=np.float64)


def decide(probabilities: Floats, calibration: Calibration | None) -> NDArray[np.bool_]:
    """Return whether each label is given, (num_rows, num_labels)."""
    return np.asarray(probabilities >= get_thresholds(calibration, probabilities.shape[1]))


def choose_threshold(probabilities: Floats, truth: Integers) -> float:
    """Return the threshold with the best F1 of one label.

    It lies between two probabilities of the rows, and of equally good ones it is the highest. If no
    row has the label, the result is DEFAULT_THRESHOLD.

    Args:
        probabilities: Shape (num_rows,).
        truth: 0 or 1, shape (num_rows,).
    """
    if not truth.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    num_right = truth[order].cumsum()
    num_given = np.arange(1, len(order) + 1)
    f1 = 2 * num_right / (num_given + truth.sum())
    following = np.append(ordered[1:], 0.0)
    # Rows with the same probability are given together.
    f1[ordered == following] = -1
    best = int(f1.argmax())
    return float((ordered[best] + following[best]) / 2)


# Metrics. Scores are those of `make_metric_scores`.


def _count(scores: Floats, labels: Integers, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the true positives, true and given labels of each resample, (num_resamples, k)."""
    given = scores[:, 1]
    return weights @ (given * labels), weights @ labels.astype(np.float64), weights @ given


def _f1(num_right: Floats, num_true: Floats, num_given: Floats) -> Floats:
    return np.asarray(2 * num_right / np.maximum(num_true + num_given, 1))


def _macro_f1(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean F1 of the labels that occur as truth or as answer."""
    num_right, num_true, num_given = _count(scores, labels, weights)
    num_defined = (num_true + num_given > 0).sum(axis=1)
    sums = _f1(num_right, num_true, num_given).sum(axis=1)
    return np.asarray(sums / np.maximum(num_defined, 1))


def _micro_f1(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the F1 of all pairs of a row and a label."""
    num_right, num_true, num_given = _count(scores, labels, weights)
    return _f1(num_right.sum(axis=1), num_true.sum(axis=1), num_given.sum(axis=1))


def _samples_f1(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean F1 of rows. A row without a label, answered with none, has an F1 of 1."""
    given = scores[:, 1]
    num_either = labels.sum(axis=1) + given.sum(axis=1)
    f1 = 2 * (given * labels).sum(axis=1) / np.maximum(num_either, 1)
    return _mean(np.where(num_either == 0, 1.0, f1), weights)


def _subset_accuracy(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the share of rows with every label right."""
    return _mean((scores[:, 1] == labels).all(axis=1), weights)


def _log_loss(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean binary cross-entropy over rows and labels, in nats, clipped at 2.2e-16."""
    right = np.where(labels > 0, scores[:, 0], 1 - scores[:, 0])
    return _mean(-np.log(np.clip(right, np.finfo(np.float64).eps, 1)).mean(axis=1), weights)


def _ece(scores: Floats, labels: Integers, weights: Floats) -> Floats:
    """Return the mean over labels of the gap between probability and share, in NUM_BINS bins.

    Equation 3 of Guo et al. (2017), "On Calibration of Modern Neural Networks", with the
    probability of the label as confidence.
    """
    total = np.zeros(len(weights))
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    for probabilities, truth in zip(scores[:, 0].T, labels.T, strict=True):
        bins = np.searchsorted(edges, probabilities, side="left")
        in_bin = bins[:, None] == np.arange(NUM_BINS)
        gaps = weights @ (in_bin * (truth - probabilities)[:, None])
        total += np.abs(gaps).sum(axis=1)
    return np.asarray(total / (labels.shape[1] * weights.sum(axis=1)))


def _average_precisions(
    scores: Floats, labels: Integers, weights: Floats, only: Sequence[int] | None = None
) -> Floats:
    """Return the mean over labels of the average precision, nan where no label occurs.

    The sum over recall steps of the precision, without interpolation, as scikit-learn has it. Rows
    with equal probabilities are one step. Labels that a resample lacks are left out of its mean.
    """
    total, num_defined = np.zeros(len(weights)), np.zeros(len(weights))
    for i in range(labels.shape[1]) if only is None else only:
        order = np.argsort(-scores[:, 0, i], kind="stable")
        ordered = scores[order, 0, i]
        is_last = np.append(ordered[1:] != ordered[:-1], True)
        num_given = weights[:, order].cumsum(axis=1)[:, is_last]
        num_right = (weights[:, order] * labels[order, i]).cumsum(axis=1)[:, is_last]
        steps = np.diff(num_right, axis=1, prepend=0.0)
        area = (steps * num_right / np.maximum(num_given, 1)).sum(axis=1)
        total += area / np.maximum(num_right[:, -1], 1)
        num_defined += num_right[:, -1] > 0
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(total, num_defined, out=undefined, where=num_defined > 0))


def _mean(amounts: NDArray[Any], weights: Floats) -> Floats:
    return np.asarray(weights @ amounts / weights.sum(axis=1))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("macro_f1", _macro_f1),
        Metric("micro_f1", _micro_f1),
        Metric("samples_f1", _samples_f1),
        Metric("subset_accuracy", _subset_accuracy),
        Metric("average_precision", _average_precisions, undefined_if="no row has a label"),
        Metric("log_loss", _log_loss, greater_is_better=False),
        Metric("ece", _ece, greater_is_better=False),
    )
}
