"""What a task is: all that depends on the kind of label, behind one object.

`SingleLabel`, `MultiLabel` and `Regression` are the tasks. Importing this module does not import
torch: a classifier saved as ONNX answers without torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.errors import DataError, RecipeError, did_you_mean, show
from lora_sentiment.evaluation.metric import Metric, score_metrics
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks.label_values import Fault

if TYPE_CHECKING:
    import torch

Labels = NDArray[Any]
"""Labels of rows: indices (num_rows,), 0 and 1 (num_rows, num_labels), or numbers (num_rows,)."""
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Calibration = dict[str, float | list[float] | list[list[float]]]
"""What is fitted on rows that were not trained on, as `card.json` records it: `temperature` with the
scores of `tasks/label_sets.py`, or `thresholds`."""


def get_temperature(calibration: Calibration | None) -> float | None:
    """Return the temperature of a calibration, or None if none is known."""
    temperature = (calibration or {}).get("temperature")
    return temperature if isinstance(temperature, float) else None


@dataclass(frozen=True)
class ReadLabels:
    """The labels of a role.

    Attributes:
        names: Label names.
        labels: The label of each row, of any value where it has a fault.
        faults: Position of each row whose label cannot be used, and its fault.
    """

    names: tuple[str, ...]
    labels: Labels
    faults: dict[int, Fault]


class Objective:
    """The training loss of a task, with what it takes from the training rows."""

    def loss_sum(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Return the loss summed over the rows, in fp32.

        The sum over all micro-batches, divided by the `total_weight` of the optimizer step, is the
        mean loss of the step. The mean of the means of unequal micro-batches is not.

        Args:
            logits: Shape (num_rows, num_labels).
            labels: The labels of the rows, as the task has them.
        """
        raise NotImplementedError

    def total_weight(self, labels: Labels) -> float:
        """Return the sum of the rows' weights, by which the summed loss of a step is divided."""
        return float(len(labels))

    def to_units(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits of the model in training as the saved model gives them."""
        return logits

    def fold_into(self, layer: "torch.nn.Linear") -> None:
        """Fold what the loss scaled into the last layer of the head, in place."""

    def unfold_from(self, layer: "torch.nn.Linear") -> None:
        """Undo `fold_into`, so that a saved head can be trained further."""


class Task:
    """All that depends on the kind of label.

    Attributes:
        name: Its value of `data.task`.
        problem_type: Its name in transformers' `config.json`.
        activation: What turns logits into scores, by transformers' name for `function_to_apply`.
        shown: The metrics that tables show, best known first. The last one settles ties.
        evaluated: The metrics of each evaluation of a training. The last one is drawn with the loss.
        has_wrong_labels: Whether a label is right or wrong, and not near or far.
        in_percent: Whether the first metrics of `shown` are shares.
        picture: Name of the picture of the judged rows.
        picture_text: What the picture shows.
        answer_columns: The columns that `predict` adds, with the Python type of their values.
        kind: What a model is, for a card: follows "A text". `{labels}` stands for the labels.
        limits: What its answers cannot say, as a sentence for a card.
        trust: How far its scores can be trusted, as a sentence for a card.
        test: Name of the p value of `compare_runs`, and of its test.
        hub_metrics: Metrics that a model card reports to the Hub, with the Hub's name of each.
    """

    name = ""
    problem_type = ""
    activation = "softmax"
    shown: tuple[str, ...] = ()
    evaluated: tuple[str, str] = ("", "")
    in_percent = True
    has_wrong_labels = True
    picture = ""
    picture_text = ""
    answer_columns: Mapping[str, type] = {}
    kind = "classifier with the labels {labels}"
    limits = (
        "It knows the labels {labels} and no other; every text gets one of them, fitting or not."
    )
    trust = "Probabilities are as the model gives them; `ece` above says how far to trust them."
    test: tuple[str, str] = ("", "")
    hub_metrics: Mapping[str, str] = {}

    @property
    def head_type(self) -> str | None:
        """The `problem_type` that a new head gets. That of single labels is transformers' own."""
        return self.problem_type

    def get_decisive(self, calibration: Calibration | None) -> list[Any]:
        """Return what of the task decides an answer, for the hash of an adapter or model."""
        return [self.name, calibration]

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
        """Turn the values of a role into labels.

        Args:
            values: The value of each row. With several label columns, the list of their values.
            config: The recipe's `data` section.
            names: Label names in order. None takes those of the source.
            own_names: Label names that the source declares, or None.
            where: The role, for messages.
            num_files: Number of files of the role.

        Raises:
            DataError: The values are no labels of this task.
        """
        raise NotImplementedError

    def count_outputs(self, config: DataConfig) -> int | None:
        """Return the number of outputs of the model if the recipe tells it, or None."""
        names = config.label_columns or config.labels
        return len(names) if names else None

    def are_hidden(self, values: list[Any], names: Sequence[str]) -> bool:
        """Return whether the labels of a role are withheld, as in the test splits of GLUE."""
        return False

    def check_train(self, labels: Labels, names: Sequence[str], config: DataConfig) -> str | None:
        """Return why the training rows cannot train a model, or None."""
        raise NotImplementedError

    def find_occurrences(self, labels: Labels) -> tuple[Integers, Integers]:
        """Return each occurrence of a label as position of the row and index of the label."""
        raise NotImplementedError

    def count_labels(self, labels: Labels, names: Sequence[str]) -> dict[str, int]:
        """Return the number of rows of each label."""
        counts = np.bincount(self.find_occurrences(labels)[1], minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))

    def describe_labels(self, labels: Labels, names: Sequence[str]) -> dict[str, Any]:
        """Return the facts about the labels of a role for the data report, by key."""
        return {"labels": self.count_labels(labels, names)}

    def find_strata(self, labels: Labels) -> Integers:
        """Return the stratum of each row, (num_rows,): a sample keeps the shares of strata."""
        raise NotImplementedError

    def choose_texts(
        self, labels: Labels, sizes: Integers, *, fraction: float, generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Choose distinct texts that hold a fraction of the rows of each stratum.

        Args:
            labels: The label of each text.
            sizes: Number of rows of each text, (num_texts,).
            fraction: Share of the rows to choose.
            generator: Draws the texts.

        Returns:
            Whether each text is chosen, (num_texts,).
        """
        is_chosen = np.zeros(len(labels), dtype=bool)
        strata = self.find_strata(labels)
        for stratum in np.unique(strata):
            texts = np.flatnonzero(strata == stratum)
            num_wanted = max(1, round(int(sizes[texts].sum()) * fraction))
            texts = texts[generator.permutation(len(texts))]
            # Take the first texts in this order that together have as many rows as wanted. Of a few
            # texts with many rows each, enough must stay for the other parts.
            num_texts = np.searchsorted(sizes[texts].cumsum(), num_wanted) + 1
            num_others = math.ceil(1 / fraction - 1e-9) - 1
            is_chosen[texts[: min(num_texts, max(1, len(texts) - num_others))]] = True
        return is_chosen

    def make_toy_labels(self, num_rows: int, num_labels: int) -> Labels:
        """Return labels of any values, for a measurement."""
        raise NotImplementedError

    # Training

    def make_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str], device: "torch.device"
    ) -> Objective:
        """Return the training loss.

        Args:
            config: The recipe's `train` section.
            labels: Labels of the training rows.
            names: Label names in order.
            device: Device of the logits.

        Raises:
            RecipeError: A setting does not fit the labels.
            DataError: A setting needs other rows.
        """
        raise NotImplementedError

    def describe_objective(
        self, config: TrainConfig, *, labels: Labels, names: Sequence[str]
    ) -> str | None:
        """Return what the loss takes from the training rows, for the log, or None.

        Raises:
            RecipeError: As `make_objective`.
            DataError: As `make_objective`.
        """
        return None

    def calibrate(
        self, logits: NDArray[np.float32], labels: Labels, names: Sequence[str]
    ) -> tuple[Calibration | None, str]:
        """Fit on validation what turns logits into answers, and describe it for the log."""
        return None, ""

    # Answers

    def check_answers(self, names: Sequence[str], calibration: Calibration | None) -> str | None:
        """Return what is wrong with the label names or the calibration of a folder, or None."""
        if len(set(names)) < max(2, len(names)) or not all(names):
            return f"labels: found {show(names)}; a classifier needs two or more different names"
        return None

    def compute_scores(self, logits: NDArray[np.floating], *, temperature: float = 1.0) -> Floats:
        """Turn logits into scores, both of shape (num_rows, num_labels).

        Raises:
            ModelError: The temperature is not a positive, finite number.
        """
        raise NotImplementedError

    def make_answer(
        self, scores: Floats, names: Sequence[str], calibration: Calibration | None
    ) -> dict[str, Any]:
        """Return the answer to a text by the keys `answer_columns`.

        Args:
            scores: Its scores, shape (num_labels,).
            names: Label names in order.
            calibration: As `calibrate` returned it.
        """
        raise NotImplementedError

    def get_answer(self, prediction: Any) -> dict[str, Any]:
        """Return the fields of a `classifier.Prediction` that are the answer."""
        return {name: getattr(prediction, name) for name in self.answer_columns}

    def to_columns(self, answer: Mapping[str, Any]) -> list[Any]:
        """Return an answer as values of the columns `answer_columns`."""
        return list(answer.values())

    def list_cells(self, names: Sequence[str]) -> list[str]:
        """Return the texts that a column of answers may hold, or the longest of them."""
        return list(names)

    def show_answer(self, answer: Mapping[str, Any]) -> str:
        """Return an answer as cells of a line, separated by tabs."""
        raise NotImplementedError

    def count_answers(
        self, columns: Mapping[str, Sequence[Any]], names: Sequence[str]
    ) -> dict[str, int]:
        """Return the number of rows of each label from columns of answers, None where a text has none."""
        raise NotImplementedError

    def find_flips(
        self,
        before: NDArray[np.floating],
        after: NDArray[np.floating],
        calibration: Calibration | None,
    ) -> NDArray[np.bool_]:
        """Return whether two forms of a model give different answers, from the logits of both."""
        raise NotImplementedError

    def find_right(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> NDArray[np.bool_] | None:
        """Return whether each row is answered rightly, or None where answers are not right or wrong."""
        return None

    def find_allowed_difference(self, logits: NDArray[np.floating], tolerance: float) -> float:
        """Return the largest difference of a logit between two computations of one model."""
        return tolerance

    # Scores

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics by name."""
        raise NotImplementedError

    def score(
        self,
        logits: NDArray[np.floating],
        labels: Labels,
        *,
        names: Sequence[str],
        calibration: Calibration | None,
    ) -> dict[str, Interval]:
        """Score a model by every metric, each with a bootstrap interval over the rows.

        Args:
            logits: Shape (num_rows, num_labels).
            labels: The labels of the rows.
            names: Label names in order.
            calibration: As `calibrate` returned it.

        Raises:
            ModelError: The logits have another shape or are not finite.
            DataError: There are no rows, or the labels do not fit the logits.
        """
        scores = self.make_metric_scores(logits, labels, calibration)
        return score_metrics(list(self.metrics.values()), scores, labels)

    def make_metric_scores(
        self, logits: NDArray[np.floating], labels: Labels, calibration: Calibration | None
    ) -> Floats:
        """Return the scores that the metrics take, after checking logits and labels."""
        raise NotImplementedError

    def quick_score(self, logits: NDArray[np.floating], labels: Labels, name: str) -> float:
        """Score a model by one metric, without an interval, as an evaluation during training does.

        Raises:
            RecipeError: There is no metric of that name.
            ModelError: As `score`.
            DataError: As `score`, and if the metric is undefined on these rows.
        """
        metric = self.find_metric(name)
        value = metric.value(self.make_metric_scores(logits, labels, None), labels)
        if np.isnan(value):
            raise DataError(
                f"{name} has no value: {metric.undefined_if}; add rows or choose another metric"
            )
        return value

    def find_metric(self, name: str) -> Metric:
        """Return the metric of a name.

        Raises:
            RecipeError: There is none.
        """
        if name not in self.metrics:
            allowed = ", ".join(self.metrics)
            raise RecipeError(
                f"{name!r} is no metric of {self.name}; choose from "
                f"{allowed}{did_you_mean(name, list(self.metrics))}"
            )
        return self.metrics[name]

    def check_metric(self, name: str, *, labels: Labels, names: Sequence[str]) -> None:
        """Refuse a metric that cannot tell one checkpoint from another.

        Args:
            name: Name of a metric.
            labels: Labels of the validation rows.
            names: Label names in order.

        Raises:
            RecipeError: There is no metric of that name.
            DataError: The rows do not define it.
        """
        self.find_metric(name)

    def compare_runs(
        self,
        own: tuple[NDArray[np.float32], Calibration | None],
        other: tuple[NDArray[np.float32], Calibration | None],
        labels: Labels,
    ) -> tuple[Interval, float]:
        """Compare two models on the same rows, each given by its logits and calibration.

        Returns:
            The first of `shown` of `own` minus that of `other`, with a paired bootstrap interval,
            and the p value of `test`.
        """
        raise NotImplementedError

    def narrow(
        self, run: tuple[NDArray[np.float32], Calibration | None], labels: Labels, num_labels: int
    ) -> tuple[tuple[NDArray[np.float32], Calibration | None], Labels]:
        """Leave out what a model with only the first labels could not have answered.

        Args:
            run: Logits and calibration of a model.
            labels: Labels of the rows.
            num_labels: Number of the first labels.

        Returns:
            The run and the labels of what is left.
        """
        return run, labels

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
        """Draw the answers to judged rows."""
        raise NotImplementedError

    def describe_calibration(self, calibration: Calibration, names: Iterable[str]) -> str:
        """Return a sentence about the calibration, for a model card."""
        raise NotImplementedError
