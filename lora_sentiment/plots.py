"""Pictures of a run: the training curve and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lora_sentiment.training.loop import History

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#9aa5b1"


def plot_training(history: History, path: Path, *, title: str) -> None:
    """Draw the loss of every optimizer step, its running mean, and accuracy on validation."""
    steps = np.array([point.step for point in history.steps])
    losses = np.array([point.loss for point in history.steps])
    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=GREY, linewidth=0.6, alpha=0.6)
    axes.plot(steps[window - 1 :], smooth, color=BLUE, label=f"training loss (mean of {window} steps)")
    axes.plot(
        [p.step for p in history.evaluations],
        [p.log_loss for p in history.evaluations],
        "o--",
        color=ORANGE,
        label="validation log-loss",
    )
    for point in history.evaluations:
        axes.annotate(
            f"{point.accuracy:.1%}", (point.step, point.log_loss), textcoords="offset points", xytext=(0, 7), ha="right"
        )
    axes.axvline(history.best_step, color=GREY, linestyle=":", label=f"kept: step {history.best_step}")
    axes.set(xlabel="optimizer step", ylabel="loss", title=f"{title} (labels: validation accuracy)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_confusion(matrix: NDArray[np.int64], path: Path, *, labels: Sequence[str], title: str) -> None:
    """Draw true labels (rows) against predictions (columns), counts and the share of each true label.

    Args:
        matrix: Counts of shape (num_labels, num_labels).
        path: PNG file.
        labels: Label names in order.
        title: Written above.
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


def _save(figure: Figure, path: Path) -> None:
    # The default metadata names the drawing library's version: pictures of equal runs should be equal.
    figure.savefig(path, dpi=120, metadata={"Software": ""})
