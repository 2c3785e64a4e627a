"""Make the report page of an adapter: one HTML file without scripts that loads nothing."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.adapter.card import NO_VALUE, TEMPLATES
from lora_sentiment.adapter.folder import Card
from lora_sentiment.data.report import list_cells, list_notes
from lora_sentiment.data.texts import Text
from lora_sentiment.errors import one_line
from lora_sentiment.evaluation.metric import score_metrics, show_metric
from lora_sentiment.evaluation.statistics import Interval, show_interval
from lora_sentiment.tasks.label_sets import describe_short_labels, has_label_sets
from lora_sentiment.tasks.task import get_temperature

REPORT_PAGE = "report.html"
SHOWN_COVERAGES = (0.8, 0.9, 0.95, 0.99)
SHOWN_ERRORS = 50
SHOWN_SLICES = 40
"""Labels that have a slice of their own: those with the worst figures."""
SHOWN_CHARACTERS = 600
"""Characters of a text that are shown."""
SHORT_CELL = 60
"""Characters of a cell that stay in one line."""
NUM_LENGTHS = 4
"""Slices by length, of about equal size."""
NUM_BINS = 10


@dataclass(frozen=True)
class JudgedRows:
    """The rows that a page is about, and the answers to them.

    Attributes:
        role: Name of the role or split.
        logits: Shape (num_rows, num_labels).
        labels: The labels of the rows, as their task has them.
        lengths: Tokens of each whole text, (num_rows,).
        numbers: Position of each row in its source, counted from 1, (num_rows,).
        texts: The texts or pairs, or None for a page that holds no text.
    """

    role: str
    logits: NDArray[np.float32]
    labels: NDArray[Any]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int64]
    texts: Sequence[Text] | None = None


def make_report_page(
    name: str,
    card: Card,
    judged: JudgedRows,
    *,
    scores: Mapping[str, Mapping[str, Interval]],
    data: Mapping[str, Any],
    pictures: Mapping[str, Path],
) -> str:
    """Return the page. Everything from the user's data is escaped.

    Args:
        name: Name of the adapter.
        card: Content of `card.json`.
        judged: The rows that slices and errors are of.
        scores: Role to metric to its interval.
        data: The `data` block of `report.json`.
        pictures: What a picture shows, to its file. A file that is missing is left out.
    """
    template = Template((TEMPLATES / "report.html").read_text(encoding="utf-8"))
    best_known = card.task.shown[0]
    headline = show_interval(scores[judged.role][best_known].as_dict())
    facts = {
        f"{show_metric(best_known)} on {judged.role}": headline,
        "rows": f"{len(judged.labels):,}",
        "base": card.base.name,
        "method": card.method.kind,
        "read": f"{card.max_length} tokens of a text ({card.truncation})",
        "labels": str(len(card.labels)),
    }
    shown_facts = [f"<div><dt>{_text(key)}</dt><dd>{_text(facts[key])}</dd></div>" for key in facts]
    return template.substitute(
        name=_text(name),
        role=_text(judged.role),
        facts="\n".join(shown_facts),
        results=_show_results(scores),
        pictures="\n".join(_embed(title, path) for title, path in pictures.items()),
        calibration=_show_calibration(card, judged),
        label_sets=_show_label_sets(card, judged),
        slices=_show_slices(card, judged),
        errors=_show_errors(card, judged),
        data=_show_data(data),
    )


def _text(value: object) -> str:
    """Return a value as one line of escaped text."""
    return escape(one_line(str(value), limit=SHOWN_CHARACTERS))


def _make_table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a title, whose first column names the rows."""
    lines = [
        f'<div class="scroll" role="region" aria-label="{_text(title)}" tabindex="0">',
        f"<table><caption>{_text(title)}</caption>",
        "<thead><tr>",
        *(f'<th scope="col">{_text(cell)}</th>' for cell in heading),
        "</tr></thead>",
        "<tbody>",
    ]
    for first, *others in rows:
        cells = [f'<th scope="row"><bdi>{_text(first)}</bdi></th>']
        for cell in others:
            kind = "long" if len(cell) > SHORT_CELL else "short"
            cells.append(f'<td class="{kind}"><bdi>{_text(cell)}</bdi></td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _show_results(scores: Mapping[str, Mapping[str, Interval]]) -> str:
    rows = []
    for metric in next(iter(scores.values())):
        cells = []
        for own in scores.values():
            interval = own[metric].as_dict() if metric in own else NO_VALUE
            cells.append(show_interval(interval))
        rows.append([show_metric(metric), *cells])
    return _make_table("Metrics with 95 % intervals", ["metric", *scores], rows)


def _embed(title: str, path: Path) -> str:
    """Return a picture within the page, or nothing for a file that is missing."""
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{_text(title)}">'
        f"<figcaption>{_text(title)}</figcaption></figure>"
    )


def _show_calibration(card: Card, judged: JudgedRows) -> str:
    """Return how often answers are right by their score, before and after the temperature."""
    temperature = get_temperature(card.calibration)
    if temperature is None:
        return f"<p>{_text(card.task.trust)}</p>"
    tables = []
    for title, value in (("as they are", 1.0), (f"at temperature {temperature:.3f}", temperature)):
        scores = card.task.compute_scores(judged.logits, temperature=value)
        highest = scores.max(axis=1)
        is_right = scores.argmax(axis=1) == judged.labels
        bins = np.minimum((highest * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        rows = []
        for number in np.unique(bins).tolist():
            own = bins == number
            rows.append(
                [
                    f"{number / NUM_BINS:.1f} to {(number + 1) / NUM_BINS:.1f}",
                    f"{own.sum():,}",
                    f"{highest[own].mean():.3f}",
                    f"{is_right[own].mean():.3f}",
                ]
            )
        heading = ["score of the answer", "rows", "mean score", "share right"]
        tables.append(_make_table(f"Scores {title}", heading, rows))
    return "\n".join(tables)


def _show_label_sets(card: Card, judged: JudgedRows) -> str:
    """Return what the label sets of the judged rows hold, or how to get label sets."""
    if not has_label_sets(card.calibration):
        return "<p>None: the recipe had no <code>data.calibration_fraction</code>.</p>"
    calibration: Any = card.calibration
    scores = card.task.compute_scores(judged.logits, temperature=calibration["temperature"])
    rows, notes = [], []
    for coverage in SHOWN_COVERAGES:
        is_held = 1 - scores <= card.task.find_set_thresholds(calibration, coverage)
        has_own = is_held[np.arange(len(judged.labels)), judged.labels]
        sizes = is_held.sum(axis=1)
        lowest = min(has_own[judged.labels == label].mean() for label in np.unique(judged.labels))
        shares = [has_own.mean(), lowest, (sizes == 1).mean(), (sizes == 0).mean()]
        cells = [f"{share:.1%}" for share in shares]
        rows.append([f"{coverage:.0%}", *cells, f"{sizes.mean():.2f}"])
        short = describe_short_labels(calibration, coverage, card.labels)
        if short:
            notes.append(f"<p>{_text(short)}.</p>")
    heading = [
        "asked for",
        "achieved",
        "lowest of a label",
        "sets with one label",
        "empty sets",
        "mean size",
    ]
    return "\n".join([_make_table(f"Label sets on {judged.role}", heading, rows), *notes])


def _show_slices(card: Card, judged: JudgedRows) -> str:
    """Return the best-known metric of texts of similar length, and of the rows of each label."""
    task = card.task
    metric = task.find_metric(task.shown[0])
    scores = task.make_metric_scores(judged.logits, judged.labels, card.calibration)
    edges = np.quantile(
        judged.lengths, np.arange(1, NUM_LENGTHS) / NUM_LENGTHS, method="inverted_cdf"
    )
    by_length = np.searchsorted(edges, judged.lengths)
    slices: dict[str, dict[str, NDArray[np.int64]]] = {"length": {}, "label": {}}
    for number in np.unique(by_length):
        own = np.flatnonzero(by_length == number)
        lengths = judged.lengths[own]
        slices["length"][f"{lengths.min():,} to {lengths.max():,} tokens"] = own
    places, labels = task.find_occurrences(judged.labels)
    for label in np.unique(labels).tolist():
        slices["label"][card.labels[label]] = places[labels == label]
    parts = []
    for kind, named in slices.items():
        found = []
        for name, own in named.items():
            interval = score_metrics([metric], scores[own], judged.labels[own])[metric.name]
            found.append((interval.value or 0.0, [name, f"{len(own):,}", _show(interval)]))
        if kind == "label":
            found.sort(key=lambda pair: pair[0], reverse=not metric.greater_is_better)
        rows = [row for _, row in found]
        if rows:
            title = f"{show_metric(metric.name)} by {kind}"
            parts.append(_make_table(title, [kind, "rows", "95 % interval"], rows[:SHOWN_SLICES]))
        if len(rows) > SHOWN_SLICES:
            parts.append(f"<p>{len(rows) - SHOWN_SLICES:,} labels with better figures follow.</p>")
    return "\n".join(parts)


def _show(interval: Interval) -> str:
    """Return an interval; some slice may have a value and no interval."""
    return "n/a" if interval.low is None else show_interval(interval.as_dict())


def _show_errors(card: Card, judged: JudgedRows) -> str:
    """Return the answers that are farthest from the labels."""
    task = card.task
    distances = task.measure_distances(judged.logits, judged.labels)
    order = np.argsort(-distances, kind="stable")
    is_right = task.find_right(judged.logits, judged.labels, card.calibration)
    told = f"The {SHOWN_ERRORS} rows whose answer is farthest from the value"
    if is_right is not None:
        order = order[~is_right[order]]
        told = f"{len(order):,} of {len(distances):,} rows are answered wrongly"
        if len(order) > SHOWN_ERRORS:
            told += f"; the {SHOWN_ERRORS} farthest from their label"
    scores = task.compute_scores(judged.logits)
    rows = []
    for row in order[:SHOWN_ERRORS].tolist():
        answer = task.make_answer(scores[row], card.labels, card.calibration)
        cells = [
            f"{judged.numbers[row]:,}",
            one_line(task.show_label(judged.labels[row], card.labels), limit=60),
            task.show_answer(answer).replace("\t", " "),
            f"{judged.lengths[row]:,}",
        ]
        if judged.texts is not None:
            text = judged.texts[row]
            cells.append(text if isinstance(text, str) else " | ".join(text))
        rows.append(cells)
    heading = ["row", "label", "answer", "tokens"]
    if judged.texts is not None:
        heading.append("text")
    if not rows:
        return f"<p>{_text(told)}.</p>"
    return f"<p>{_text(told)}. An error may be one of the label.</p>\n" + _make_table(
        f"Rows of {judged.role}", heading, rows
    )


def _show_data(data: Mapping[str, Any]) -> str:
    """Return the data report: a table with a column for each role, and its notes."""
    # Older versions wrote other blocks.
    labelled = {role: block for role, block in data.items() if {"rows", "duplicates"} <= set(block)}
    if not labelled:
        return "<p>The folder has no data report of this version's layout.</p>"
    columns = {role: list_cells(role, block) for role, block in labelled.items()}
    first = next(iter(columns.values()))
    rows = []
    for heading in list(first)[1:]:
        rows.append([heading, *(column[heading] for column in columns.values())])
    notes = [f"<li>{_text(note)}</li>" for note in list_notes(labelled)]
    shown = _make_table("Rows of each role", ["", *columns], rows)
    return f"{shown}\n<ul>{''.join(notes)}</ul>" if notes else shown
