"""Plots: training curve and confusion matrix of a run, and several runs compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray

from lora_sentiment.errors import one_line
from lora_sentiment.evaluation.metric import show_metric

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_sentiment.training.history import History

MAX_CELLS = 25
"""Most labels of a confusion matrix with numbers in its cells: matplotlib draws 200 a second."""
MAX_NAMES = 100
"""Most labels that are drawn by their names."""
BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#9aa5b1"


_STYLE = style.context("default")
"""matplotlib's own style, because a user's may need LaTeX or fonts: equal runs give equal plots."""


@_STYLE
def plot_training(history: "History", path: Path, *, title: str) -> None:
    """Draw the loss of each step, its running mean, and two metrics on validation."""
    steps = np.array([point.step for point in history.steps])
    losses = np.array([point.loss for point in history.steps])
    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=GREY, linewidth=0.6, alpha=0.6)
    label = f"training loss (mean of {window} steps)"
    axes.plot(steps[window - 1 :], smooth, color=BLUE, label=label)
    if history.evaluations:
        first, last = history.evaluations[0].scores
        evaluated = [point.step for point in history.evaluations]
        lasts = [point.scores[last] for point in history.evaluations]
        axes.plot(evaluated, lasts, "o--", color=ORANGE, label=f"validation {show_metric(last)}")
        title = f"{title} (labels: validation {show_metric(first)})"
    for point in history.evaluations:
        axes.annotate(
            f"{point.scores[first]:.3f}",
            (point.step, point.scores[last]),
            textcoords="offset points",
            xytext=(0, 7),
            ha="right",
        )
    best = history.best_step
    axes.axvline(best, color=GREY, linestyle=":", label=f"kept: step {best}")
    axes.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    _set_title(axes, title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@_STYLE
def plot_confusion(
    matrix: NDArray[np.int64], path: Path, *, labels: Sequence[str], title: str
) -> None:
    """Draw true labels (rows) against predictions (columns): shares of the true label, and counts.

    From MAX_CELLS labels on there is no text in the cells, and from MAX_NAMES on labels are
    numbers.

    Args:
        matrix: Counts of shape (num_labels, num_labels).
        path: PNG file.
        labels: Label names in order.
        title: Title.
    """
    num_labels = len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = name_labels(labels) if num_labels <= MAX_NAMES else []
    longest = max(map(len, names), default=0)
    rotation = 0 if num_labels <= 3 and longest <= 12 else 90
    size = 3 + min(0.8 * num_labels, 12)
    margin = 0.08 * longest if rotation else 0
    figure = Figure(figsize=(size + 0.8 + margin, size + margin), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    _set_title(axes, title)
    if num_labels > MAX_CELLS:
        figure.colorbar(image, label="share of the true label", shrink=0.8)
    else:
        for row, column in np.argwhere(matrix):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{matrix[row, column]:,}\n{shares[row, column]:.1%}"
            size = min(9, 126 / num_labels)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    if names:
        look: dict[str, Any] = {"fontsize": min(10, 700 / num_labels), "parse_math": False}
        axes.set_xticks(range(num_labels), names, rotation=rotation, **look)
        axes.set_yticks(range(num_labels), names, **look)
    _save(figure, path)


@_STYLE
def plot_labels(
    *,
    num_found: NDArray[np.int64],
    num_missed: NDArray[np.int64],
    num_wrong: NDArray[np.int64],
    path: Path,
    labels: Sequence[str],
    title: str,
) -> None:
    """Draw for each label how often it was found, missed and given wrongly.

    Args:
        num_found: Rows with the label that got it, (num_labels,).
        num_missed: Rows with the label that did not get it, (num_labels,).
        num_wrong: Rows that got the label without having it, (num_labels,).
        path: PNG file.
        labels: Label names in order.
        title: Title.
    """
    names = name_labels(labels) if len(labels) <= MAX_NAMES else []
    figure = Figure(figsize=(8, 1.5 + min(0.35 * len(labels), 12)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(labels))
    axes.barh(places, num_found, color=BLUE, label="found")
    axes.barh(places, num_missed, left=num_found, color=GREY, label="missed")
    left = num_found + num_missed
    axes.barh(places, num_wrong, left=left, color=ORANGE, label="given wrongly")
    if names:
        look: dict[str, Any] = {"fontsize": min(10, 700 / len(labels)), "parse_math": False}
        axes.set_yticks(places, names, **look)
    axes.invert_yaxis()
    axes.set(xlabel="rows")
    _set_title(axes, title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@_STYLE
def plot_values(
    truth: NDArray[np.float64], answers: NDArray[np.floating], path: Path, *, name: str, title: str
) -> None:
    """Draw answers against true values; on the line both are equal.

    Args:
        truth: Shape (num_rows,).
        answers: Shape (num_rows,).
        path: PNG file.
        name: Name of the value.
        title: Title.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    ends = [float(truth.min()), float(truth.max())]
    axes.plot(ends, ends, color=GREY, linestyle=":")
    axes.scatter(truth, answers, s=12, alpha=0.4, color=BLUE, linewidths=0)
    shown = _replace_missing(one_line(name, limit=40))
    axes.set_xlabel(f"true {shown}", parse_math=False)
    axes.set_ylabel(f"predicted {shown}", parse_math=False)
    _set_title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def name_labels(labels: Sequence[str]) -> list[str]:
    """Return the names of labels in a picture: short, different, in characters of its font.

    A label that the font cannot show, or that begins with #, is drawn as its number, counted from 0.
    If two names are equal
    after that, each one gets its number.
    """
    names = []
    for number, label in enumerate(labels):
        name = one_line(label, limit=40)
        looks_like_number = name.startswith("#")
        if looks_like_number or not name.isprintable() or _replace_missing(name) != name:
            name = f"#{number}"
        names.append(name)
    if len(set(names)) == len(names):
        return names
    return [one_line(f"#{number} {name}", limit=40) for number, name in enumerate(names)]


def _replace_missing(text: str) -> str:
    """Return a text with U+FFFD for each character that the font of the pictures lacks."""
    font = get_font(findfont(FontProperties()))
    shown = []
    for character in text:
        has_glyph = font.get_char_index(ord(character)) > 0
        shown.append(character if has_glyph else "\N{REPLACEMENT CHARACTER}")
    return "".join(shown)


def _set_title(axes: Any, title: str) -> None:
    axes.set_title(_replace_missing(one_line(title, limit=80)), parse_math=False)


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


@_STYLE
def plot_pareto(
    points: Sequence[ParetoPoint], path: Path, *, title: str, metric: str = "accuracy"
) -> None:
    """Draw accuracy, or another metric from 0 to 1, with its interval against trained parameters.

    The area of a point is its peak memory. The line joins the runs that no run with as few trained
    parameters beats.
    """
    largest = max(point.memory_bytes for point in points)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    front = []
    names = name_labels([point.name for point in points])
    for name, point in zip(names, points, strict=True):
        percent = 100 * point.accuracy
        ends = [[100 * (point.accuracy - point.low)], [100 * (point.high - point.accuracy)]]
        axes.errorbar(point.trainable, percent, yerr=ends, color=GREY, capsize=3, zorder=1)
        label = f"{name} ({point.memory_bytes / 2**30:.1f} GiB)"
        place = (point.trainable, percent)
        look: dict[str, Any] = {"fontsize": 8, "parse_math": False}
        axes.annotate(label, place, textcoords="offset points", xytext=(7, 5), **look)
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
        ylabel=f"{metric} in %, 95 % interval",
    )
    _set_title(axes, title)
    axes.margins(x=0.25, y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


@_STYLE
def plot_learning_curve(figures: "DataFrame", path: Path, *, metric: str, title: str) -> None:
    """Draw a metric with its interval against the number of training rows.

    Args:
        figures: As `learning_curve` returns them.
        path: PNG file.
        metric: Name of the metric.
        title: Title.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    # Not error bars: the value of a metric such as ece may lie outside of its bootstrap interval.
    axes.vlines(figures.index, figures["low"], figures["high"], color=BLUE)
    axes.plot(figures.index, figures["value"], "o-", color=BLUE)
    axes.set(xscale="log", xlabel="training rows", ylabel=f"validation {show_metric(metric)}, 95 %")
    axes.set_xticks(figures.index, figures.index)
    axes.minorticks_off()
    _set_title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # The default metadata names matplotlib's version. Plots of equal runs should be equal.
    form = path.suffix[1:] or "png"
    figure.savefig(path, dpi=120, format=form, metadata={"Software": ""})
