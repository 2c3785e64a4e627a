"""The `data` block of report.json: counts and row numbers of each role, never a text."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.cleaning import find_similar
from lora_sentiment.data.batches import Encoded
from lora_sentiment.data.rows import Counts, Data, Judged, Rows
from lora_sentiment.errors import one_line, show, show_names
from lora_sentiment.tasks import Task, find_task

log = logging.getLogger("lora_sentiment")

NUM_FIRST = 5
"""Row numbers that stand beside a count of rows."""
QUANTILES = (0.5, 0.9, 0.99)
SHOWN_LABELS = 8
"""Labels that have a line of their own in the table."""
MOST_UNKNOWN = 0.2
"""Share of unknown tokens from which on a warning is due."""

DataReport = dict[str, dict[str, Any]]
"""Role to its counts, as `describe_role` makes them."""


def describe_role(
    rows: Rows,
    encoded: Encoded,
    *,
    names: Sequence[str],
    task: Task,
    max_length: int,
    read: Counts | None,
    seen_texts: NDArray[np.uint64] | None = None,
) -> dict[str, Any]:
    """Count the rows of one role as they are used, and what reading them did.

    Args:
        rows: The rows.
        encoded: Their token ids, with the lengths of whole texts.
        names: Label names.
        task: The task of the labels.
        max_length: Most tokens of an input.
        read: Counts of reading them, or None if they were carved out of train.
        seen_texts: Digests of the texts that training uses, as `Rows.digests`. None for train.

    Returns:
        `read`, `kept`, `cleaned` and `dropped`, or `carved_from`; then `rows`, what the task says
        of the labels (`labels`: rows of each),
        `duplicates` (rows whose text stands earlier in the role), `seen` (rows whose text training
        uses) and `tokens` (with the lengths of whole texts, special tokens included, and without
        these the share of tokens that stand for unknown characters).
    """
    block: dict[str, Any] = {"carved_from": "train"}
    if read is not None:
        dropped = {kind: _count_rows(numbers) for kind, numbers in read.dropped.items()}
        cleaned = {rule: count for rule, count in read.cleaned.items() if count}
        block = {"read": read.read, "kept": read.kept, "cleaned": cleaned, "dropped": dropped}
    block["rows"] = len(rows)
    block |= task.describe_labels(rows.labels, names)
    first = rows.find_first_equal()
    is_repeated = first != np.arange(len(rows))
    is_same = rows.labels[first] == rows.labels
    has_same_label = is_same.reshape(len(rows), -1).all(axis=1)
    block["duplicates"] = {
        "same_label": _count_rows(rows.numbers[is_repeated & has_same_label]),
        "other_label": _count_rows(rows.numbers[is_repeated & ~has_same_label]),
    }
    if seen_texts is not None:
        block["seen"] = _count_rows(rows.numbers[np.isin(rows.digests, seen_texts)])
    lengths = encoded.lengths if encoded.whole_lengths is None else encoded.whole_lengths
    shown_lengths = {}
    for share, length in zip(
        QUANTILES, np.quantile(lengths, QUANTILES, method="inverted_cdf"), strict=True
    ):
        shown_lengths[f"{share:.0%}"] = int(length)
    shown_lengths["longest"] = int(lengths.max())
    num_tokens = int(encoded.offsets[-1])
    num_of_texts = num_tokens - encoded.num_special * len(rows)
    block["tokens"] = {
        "tokens": num_tokens,
        "max_length": max_length,
        "truncated": encoded.truncated,
        "unknown": encoded.num_unknown,
        "unknown_share": encoded.num_unknown / max(1, num_of_texts),
        "lengths": shown_lengths,
    }
    return block


def describe_unlabelled(unlabelled: Mapping[str, int]) -> DataReport:
    """Return the blocks of roles whose labels are all hidden, so that they are not evaluated.

    Args:
        unlabelled: Role to its number of rows.
    """
    return {
        role: {"read": num_rows, "rows": 0, "unlabelled": num_rows}
        for role, num_rows in unlabelled.items()
    }


def describe_seen(data: Data, encoded: Mapping[str, Encoded], *, max_length: int) -> DataReport:
    """Count the rows that training uses.

    Args:
        data: The rows.
        encoded: Their token ids, by role.
        max_length: Most tokens of an input.
    """
    report = {}
    for role, rows in data.seen.items():
        report[role] = describe_role(
            rows,
            encoded[role],
            names=data.labels,
            task=find_task(data.config.task),
            max_length=max_length,
            read=data.counts.get(role),
            seen_texts=None if role == "train" else data.train.digests,
        )
    return report


def describe_judged(
    data: Data, judged: Judged, role: str, encoded: Encoded, *, max_length: int
) -> dict[str, Any]:
    """Count the rows of a role that is evaluated at the end.

    Args:
        data: The rows that training uses.
        judged: The rows of all evaluated roles.
        role: One of `judged.rows`.
        encoded: Token ids of the role.
        max_length: Most tokens of an input.
    """
    return describe_role(
        judged.rows[role],
        encoded,
        names=data.labels,
        task=find_task(data.config.task),
        max_length=max_length,
        read=judged.counts.get(role),
        seen_texts=data.seen_texts,
    )


def report_lines(report: DataReport, roles: Sequence[str] | None = None) -> list[str]:
    """Return an aligned table with a column for each role, and notes with row numbers below.

    Args:
        report: The counts.
        roles: Which roles; all by default.
    """
    shown = {role: report[role] for role in (report if roles is None else roles)}
    labelled = {role: block for role, block in shown.items() if "unlabelled" not in block}
    lines = _format_table(labelled) if labelled else []
    for role, block in labelled.items():
        lines += [f"{role}: {note}" for note in _make_notes(block)]
    for role, block in shown.items():
        if "unlabelled" in block:
            num_rows = block["unlabelled"]
            lines.append(f"{role}: {num_rows:,} rows without labels (all are -1): not evaluated")
    return lines


def log_warnings(report: DataReport, roles: Sequence[str] | None = None) -> None:
    """Warn of texts that the base cannot read, and of labels without rows or that may be one.

    Args:
        report: The counts.
        roles: Which roles; all by default.
    """
    for role in report if roles is None else roles:
        block = report[role]
        share = block["tokens"]["unknown_share"] if "tokens" in block else 0.0
        if share >= MOST_UNKNOWN:
            log.warning(
                "%s: %.1f%% of the tokens are [UNK]: the base does not know the script or the "
                "characters of these texts, so different texts are equal to it; choose a base of "
                "their language (model.name)",
                role,
                100 * share,
            )
        if role == "train":
            absent = [name for name, num_rows in block["labels"].items() if not num_rows]
            if absent:
                log.warning(
                    "train: no row has the label %s; integers count labels from 0",
                    show_names(absent, most=SHOWN_LABELS),
                )
            for names in find_similar(list(block["labels"])):
                counted = [f"{show(name)} ({block['labels'][name]:,} rows)" for name in names]
                log.warning(
                    "train: labels differ only in case, blanks or the form of a character: %s; if "
                    "they are one label, write it in one way",
                    ", ".join(counted),
                )


def _count_rows(numbers: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
    """Return how many rows these are, and the first row numbers, counted from 1."""
    return {"rows": len(numbers), "first": [int(number) for number in numbers[:NUM_FIRST]]}


def _show_rows(counted: Mapping[str, Any]) -> str:
    """Return `7 rows: 1, 2, 3, 4, 5, ...` for the result of `_count_rows`."""
    num_rows = counted["rows"]
    numbers = [f"{number:,}" for number in counted["first"]]
    if num_rows > len(numbers):
        numbers.append("...")
    return f"{num_rows:,} row{'' if num_rows == 1 else 's'}: {', '.join(numbers)}"


def _format_table(blocks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table with a column for each role."""
    columns = [_make_column(role, block) for role, block in blocks.items()]
    headings = list(columns[0])
    heading_width = max(len(heading) for heading in headings)
    width = max(len(cell) for column in columns for cell in column.values())
    lines = []
    for heading in headings:
        cells = [f"  {column[heading]:>{width}}" for column in columns]
        lines.append(f"{heading:<{heading_width}}" + "".join(cells))
    return lines


def _make_column(role: str, block: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a role by the heading of their line."""
    column = {"": role, "rows": f"{block['rows']:,}"}
    counts = list(block["labels"].items())
    for name, count in counts[:SHOWN_LABELS]:
        heading = f"  {one_line(name, limit=40)}"
        # Of two labels that read alike when they are cut, the second gets its number.
        if heading in column:
            heading = f"  {one_line(name, limit=30)} #{len(column) - 2}"
        column[heading] = f"{count:,}"
    for heading, value in block.get("values", {}).items():
        column[f"  value, {heading}"] = f"{value:.4g}"
    if "labels_of_a_row" in block:
        column["  no label"] = f"{block['labels_of_a_row']['none']:,}"
        column["  labels of a row, mean"] = f"{block['labels_of_a_row']['mean']:.2f}"
    others = [count for _, count in counts[SHOWN_LABELS:]]
    if others:
        column[f"  {len(others)} more, each"] = f"{min(others):,} to {max(others):,}"
    tokens = block["tokens"]
    for quantile, length in tokens["lengths"].items():
        column[f"tokens, {quantile}"] = f"{length:,}"
    share = tokens["truncated"] / block["rows"]
    column[f"cut at {tokens['max_length']} tokens"] = f"{share:.1%}"
    column["tokens unknown, [UNK]"] = f"{tokens['unknown_share']:.1%}"
    column["twice, same label"] = f"{block['duplicates']['same_label']['rows']:,}"
    column["twice, other label"] = f"{block['duplicates']['other_label']['rows']:,}"
    column["text seen in training"] = f"{block['seen']['rows']:,}" if "seen" in block else "-"
    return column


def _make_notes(block: Mapping[str, Any]) -> list[str]:
    """Return the notes of a role: what was dropped or cleaned, and texts that occur twice."""
    notes = []
    for kind, counted in block.get("dropped", {}).items():
        notes.append(f"{kind}, DROPPED: {_show_rows(counted)}")
    if block.get("cleaned"):
        cleaned = [f"{count:,} {rule}" for rule, count in block["cleaned"].items()]
        notes.append(f"rows read {block['read']:,}, of which cleaned: {', '.join(cleaned)}")
    if block["duplicates"]["other_label"]["rows"]:
        counted = _show_rows(block["duplicates"]["other_label"])
        notes.append(f"text stands earlier under another label: {counted}")
    if block.get("seen", {}).get("rows"):
        notes.append(f"text was seen in training: {_show_rows(block['seen'])}")
    return notes
