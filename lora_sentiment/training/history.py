"""The history of a run, and `metrics.csv`, which shows it line by line."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.tracking import GeneralTracker

from lora_sentiment.errors import TrainingError

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "seconds",
)
"""The columns of each line. The metrics of evaluations and `eval_best` follow."""


@dataclass(frozen=True)
class TrainPoint:
    """One optimizer step.

    Attributes:
        step: Its number, from 1.
        epoch: Epochs so far.
        loss: Mean loss over the examples of the step, weighted if the recipe weights labels.
        learning_rate: The rate of the step.
        grad_norm: Norm of the gradients before they were clipped.
        tokens: Tokens trained on so far.
        seconds: Seconds of training so far.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float = field(compare=False)

    def as_metrics(self) -> dict[str, float]:
        """Return the values for trackers, by column."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation on validation.

    Attributes:
        step: Optimizer steps before it.
        epoch: Epochs before it.
        scores: The task's `evaluated` metrics, by name.
        metric: The recipe's `train.metric_for_best_model`.
        best: Whether the model is the best so far.
        tokens: Tokens trained on before it.
        seconds: Seconds of training before it.
    """

    step: int
    epoch: float
    scores: dict[str, float]
    metric: float
    best: bool
    tokens: int
    seconds: float = field(compare=False)

    def as_metrics(self) -> dict[str, float]:
        """Return the values for trackers, by column."""
        return {
            "epoch": self.epoch,
            **{f"eval_{name}": score for name, score in self.scores.items()},
            "eval_best": int(self.best),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


@dataclass
class History:
    """The history of a run.

    Attributes:
        steps: Every optimizer step.
        evaluations: Every evaluation.
        best_step: The step whose tensors were kept.
        tokens: Tokens trained on over all processes, without padding.
        seconds: Seconds of training, without evaluations.
        max_tokens: Most padded tokens of a micro-batch now.
        cuts: Every (step, new max_tokens) at which memory ran out.
        stopped_early: Whether early stopping ended the run.
        resumed: The steps after which the run was resumed.
        changes: The differences that --allow-changes allowed, each as a sentence. With any of them
            the run does not equal an unbroken one bit for bit.
    """

    steps: list[TrainPoint] = field(default_factory=list)
    evaluations: list[EvalPoint] = field(default_factory=list)
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    max_tokens: int = 0
    cuts: list[tuple[int, int]] = field(default_factory=list)
    stopped_early: bool = False
    resumed: list[int] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def hide_later_steps(trackers: Sequence[GeneralTracker], step: int) -> None:
    """Let TensorBoard hide the steps after `step`, which a resumed run repeats."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.close()  # the next file that the writer opens starts with purge_step
            tracker.writer.purge_step = step + 1


class MetricsFile:
    """`metrics.csv`: one line for each optimizer step and each evaluation, written at once.

    An empty field is a value that was not measured at that step.

    Args:
        path: The file. It is written anew from the history, so a resumed run repeats no line.
        history: The points so far.
        metrics: Names of the metrics in evaluations.

    Raises:
        TrainingError: If the file cannot be written; so does `write`.
    """

    def __init__(self, path: Path, history: History, *, metrics: Sequence[str]) -> None:
        self.path = path
        with self._explain_errors():
            self.file = path.open("w", newline="", encoding="utf-8")
        columns = [*COLUMNS, *(f"eval_{name}" for name in metrics), "eval_best"]
        self.writer = csv.DictWriter(self.file, columns, restval="")
        with self._explain_errors():
            self.writer.writeheader()
        points: list[TrainPoint | EvalPoint] = [*history.steps, *history.evaluations]
        for point in sorted(points, key=lambda point: point.step):
            self.write(point)

    def write(self, point: TrainPoint | EvalPoint) -> None:
        """Write one line."""
        with self._explain_errors():
            self.writer.writerow({"step": point.step, **point.as_metrics()})
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self.path}: cannot be written: {error.strerror or error}; correct that, then "
                "the same command with train.resume=auto resumes from the last checkpoint"
            ) from error
