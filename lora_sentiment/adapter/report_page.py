"""Make the report page of an adapter: one HTML file without scripts that loads nothing.

The template formats, escapes and draws; this module counts.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from lora_sentiment.adapter.card import TEMPLATES
from lora_sentiment.adapter.folder import Card
from lora_sentiment.data.batches import Encoded
from lora_sentiment.errors import one_line
from lora_sentiment.evaluation.metric import show_metric
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.tasks.label_sets import LABEL_SCORES, find_set_thresholds
from lora_sentiment.tasks.task import get_temperature

REPORT_PAGE = "report.html"
COVERAGES = (0.8, 0.9, 0.95, 0.99)
NUM_ERRORS = 50


def make_report_page(
    name: str,
    card: Card,
    role: str,
    logits: NDArray[np.float32],
    encoded: Encoded,
    numbers: NDArray[np.int64],
    *,
    scores: Mapping[str, Mapping[str, Interval]],
    pictures: Mapping[str, Path],
    texts: Sequence[Any] | None = None,
    data: Sequence[str] = (),
) -> str:
    """Return the page. Everything in it is escaped.

    Args:
        name: Name of the adapter.
        card: Content of `card.json`.
        role: The role whose rows the slices and errors are of.
        logits: The answers to these rows.
        encoded: These rows.
        numbers: Position of each row in its source, counted from 1.
        scores: Role to metric to its interval.
        pictures: What a picture shows, to its file. A file that is missing is left out.
        texts: The texts, or None for a page that holds no text.
        data: The lines of the data report.
    """
    task, labels = card.task, encoded.labels
    probabilities = task.compute_scores(logits)
    is_right = task.find_right(logits, labels, card.calibration)
    places, owners = task.find_occurrences(labels)
    names = pd.Series(np.array(card.labels, dtype=object)[owners], index=places, dtype=object)
    rows = pd.DataFrame({"row": numbers, "score": probabilities.max(axis=1)})
    rows["tokens"] = encoded.lengths if encoded.whole_lengths is None else encoded.whole_lengths
    if is_right is None:
        rows["label"] = labels
        rows["figure"] = np.abs(probabilities[:, 0] - labels)
        errors = rows.nlargest(NUM_ERRORS, "figure")
    else:
        rows["label"] = names.groupby(level=0).agg(", ".join)
        rows["figure"] = is_right.astype(float)
        errors = rows[~is_right].nlargest(NUM_ERRORS, "score")
    answers = []
    for row in errors.index:
        answer = task.make_answer(probabilities[row], card.labels, card.calibration)
        answers.append(task.show_answer(answer))
    is_one = rows.tokens.nunique() == 1
    parts = rows.tokens if is_one else pd.qcut(rows.tokens, 4, duplicates="drop")
    groups = {"length": rows.groupby(parts, observed=True)}
    if len(names):
        groups["label"] = rows.loc[places].groupby(names.to_numpy())
    summary = {"rows": ("row", "size"), "first": ("tokens", "min"), "last": ("tokens", "max")}
    summary |= {"score": ("score", "mean"), "figure": ("figure", "mean")}
    if get_temperature(card.calibration):
        groups["score"] = rows.groupby((rows.score * 10).astype(int).clip(upper=9))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"line": one_line, "metric": show_metric}
    return environment.get_template("report.html").render(
        name=name,
        card=card,
        role=role,
        scores=scores,
        pictures={
            title: base64.b64encode(path.read_bytes()).decode()
            for title, path in pictures.items()
            if path.is_file()
        },
        data=data,
        groups={kind: group.agg(**summary) for kind, group in groups.items()},
        label_sets=_judge_label_sets(card, logits, labels),
        is_right=is_right,
        errors=errors.assign(answer=answers),
        num_rows=len(rows),
        texts=texts,
    )


def _judge_label_sets(card: Card, logits: NDArray[np.float32], labels: Any) -> pd.DataFrame:
    """Return what the label sets of the rows hold: a line for each coverage."""
    lines = []
    if LABEL_SCORES in (card.calibration or {}):
        temperature = get_temperature(card.calibration) or 1.0
        probabilities = card.task.compute_scores(logits, temperature=temperature)
        for coverage in COVERAGES:
            is_held = 1 - probabilities <= find_set_thresholds(card.calibration, coverage)
            has_own = pd.Series(is_held[np.arange(len(labels)), labels])
            size = is_held.sum(axis=1)
            lowest = has_own.groupby(labels).mean().min()
            lines.append([coverage, has_own.mean(), lowest, (size == 1).mean(), size.mean()])
    return pd.DataFrame(lines, columns=["coverage", "achieved", "lowest", "one", "size"])
