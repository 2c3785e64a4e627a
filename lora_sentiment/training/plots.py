"""Plots: training curve and confusion matrix of a run, and several runs compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lora_sentiment.training.history import History

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#9aa5b1"


def plot_training(history: History, path: Path, *, title: str) -> None:
    """Draw the loss of each step, its running mean, and log-loss and accuracy on validation."""
    steps = np.array([point.step for point in history.steps])
    losses = np.array([point.loss for point in history.steps])
    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=GREY, linewidth=0.6, alpha=0.6)
    label = f"training loss (mean of {window} steps)"
    axes.plot(steps[window - 1 :], smooth, color=BLUE, label=label)
    evaluated = [point.step for point in history.evaluations]
    log_losses = [point.log_loss for point in history.evaluations]
    axes.plot(evaluated, log_losses, "o--", color=ORANGE, label="validation log-loss")
    for point in history.evaluations:
        axes.annotate(
            f"{point.accuracy:.1%}",
            (point.step, point.log_loss),
            textcoords="offset points",
            xytext=(0, 7),
            ha="right",
        )
    best = history.best_step
    axes.axvline(best, color=GREY, linestyle=":", label=f"kept: step {best}")
    title = f"{title} (labels: validation accuracy)"
    axes.set(xlabel="optimizer step", ylabel="loss", title=title, ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_confusion(
    matrix: NDArray[np.int64], path: Path, *, labels: Sequence[str], title: str
) -> None:
    """Draw true labels (rows) against predictions (columns): counts, and shares of the true label.

    Args:
        matrix: Counts of shape (num_labels, num_labels).
        path: PNG file.
        labels: Label names in order.
        title: Title.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = 3 + 0.8 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{matrix[row, column]:,}\n{shares[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    ticks = range(len(labels))
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.set_xticks(ticks, labels, rotation=45 if len(labels) > 3 else 0)
    axes.set_yticks(ticks, labels)
    _save(figure, path)


@dataclass(frozen=True)
class ParetoPoint:
    """One run in a plot of accuracy against trained parameters.

    Attributes:
        name: Label of the point.
        trainable: Number of trained parameters.
        accuracy: Accuracy.
        low: Lower end of its interval.
        high: Upper end of its interval.
        memory_bytes: Peak memory, which is the area of the point.
    """

    name: str
    trainable: int
    accuracy: float
    low: float
    high: float
    memory_bytes: int


def plot_pareto(points: Sequence[ParetoPoint], path: Path, *, title: str) -> None:
    """Draw accuracy with its interval against trained parameters.

    The area of a point is its peak memory. The line joins the runs that no run with as few trained
    parameters beats.
    """
    largest = max(point.memory_bytes for point in points)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    front = []
    for point in points:
        percent = 100 * point.accuracy
        ends = [[100 * (point.accuracy - point.low)], [100 * (point.high - point.accuracy)]]
        axes.errorbar(point.trainable, percent, yerr=ends, color=GREY, capsize=3, zorder=1)
        label = f"{point.name} ({point.memory_bytes / 2**30:.1f} GiB)"
        place = (point.trainable, percent)
        axes.annotate(label, place, textcoords="offset points", xytext=(7, 5), fontsize=8)
        size = 300 * point.memory_bytes / largest
        axes.scatter([point.trainable], [percent], s=[size], color=BLUE, alpha=0.8, zorder=2)
        rivals = [other for other in points if other.trainable <= point.trainable]
        if all(other.accuracy <= point.accuracy for other in rivals):
            front.append(point)
    front.sort(key=lambda point: point.trainable)
    xs = [point.trainable for point in front]
    ys = [100 * point.accuracy for point in front]
    axes.plot(xs, ys, "--", color=ORANGE, zorder=0)
    axes.set(
        xscale="log",
        xlabel="trained parameters",
        ylabel="accuracy in %, 95 % interval",
        title=title,
    )
    axes.margins(x=0.25, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # The default metadata names matplotlib's version. Plots of equal runs should be equal.
    figure.savefig(path, dpi=120, metadata={"Software": ""})
