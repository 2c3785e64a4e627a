"""What the data looks like: counts and row numbers, never text, for the log, report.json and `lora-sentiment data`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.data.batches import Encoded
from lora_sentiment.data.rows import Counts, Data, Judged, Rows

FIRST = 5
"""How many row numbers are given of all that a count is of."""
QUANTILES = (0.5, 0.9, 0.99)
SHOWN_LABELS = 8
"""Labels that have a line of their own; more would bury the rest."""


@dataclass(frozen=True)
class Found:
    """Some rows of a split.

    Attributes:
        rows: How many.
        first: Where the first few stand in their source, counted from 1; the files of a glob count as one.
    """

    rows: int
    first: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Sequence[int] | NDArray[np.int64]) -> "Found":
        """Return the account of these row numbers."""
        return cls(len(numbers), tuple(int(number) for number in numbers[:FIRST]))

    def as_dict(self) -> dict[str, Any]:
        """Return the account for JSON."""
        return {"rows": self.rows, "first": list(self.first)}

    def __str__(self) -> str:
        rows = f"{self.rows:,} row{'s' * (self.rows != 1)}"
        numbers = ", ".join(f"{number:,}" for number in self.first)
        return f"{rows}: {numbers}{', ...' if self.rows > len(self.first) else ''}"


@dataclass(frozen=True)
class RoleReport:
    """What the rows of one role look like as they are used, and what reading them did.

    Attributes:
        rows: Rows that are used: without what was dropped, sampled away, or carved out for another role.
        labels: Label name to number of those rows.
        read: What reading the role's own split did; None where its rows were carved out of train.
        same_label: Rows whose text stands earlier in the role, under the same label.
        other_label: Rows whose text stands earlier in the role, under another label.
        seen: Rows whose text training has seen: in train, or for what is judged, in validation too. None for train.
        max_length: Most tokens of an input.
        lengths: Name of a quantile, or `longest`, to tokens of a whole text, [CLS] and [SEP] included.
        tokens: Tokens of all inputs, as cut.
        truncated: Texts that are longer than an input.
    """

    rows: int
    labels: dict[str, int]
    read: Counts | None
    same_label: Found
    other_label: Found
    seen: Found | None
    max_length: int
    lengths: dict[str, int]
    tokens: int
    truncated: int

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as report.json holds them."""
        reading: dict[str, Any] = (
            {"carved_from": "train"} if self.read is None else _reading(self.read)
        )
        return {
            **reading,
            "rows": self.rows,
            "labels": self.labels,
            "duplicates": {
                "same_label": self.same_label.as_dict(),
                "other_label": self.other_label.as_dict(),
            },
            **({} if self.seen is None else {"seen": self.seen.as_dict()}),
            "tokens": {
                "tokens": self.tokens,
                "max_length": self.max_length,
                "truncated": self.truncated,
                "lengths": self.lengths,
            },
        }


@dataclass
class DataReport:
    """What the data of a recipe looks like.

    Attributes:
        roles: Role to its report, in the order that they were read.
        unlabelled: Role to its number of rows, where all labels are hidden, so that it is not judged.
    """

    roles: dict[str, RoleReport] = field(default_factory=dict)
    unlabelled: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as report.json holds them, by role."""
        hidden = {
            role: {"read": rows, "rows": 0, "unlabelled": rows}
            for role, rows in self.unlabelled.items()
        }
        return {role: found.as_dict() for role, found in self.roles.items()} | hidden

    def to_lines(self, roles: Sequence[str] | None = None) -> list[str]:
        """Return a short aligned table, a column for each role, and below it what has row numbers.

        Args:
            roles: Which roles; all by default.
        """
        shown = {
            role: found for role, found in self.roles.items() if roles is None or role in roles
        }
        lines = _table(shown) if shown else []
        for role, found in shown.items():
            lines += [f"{role}: {note}" for note in _notes(found)]
        hidden = {
            role: rows for role, rows in self.unlabelled.items() if roles is None or role in roles
        }
        return lines + [
            f"{role}: {rows:,} rows without labels (all are -1): not judged"
            for role, rows in hidden.items()
        ]


def describe_role(
    rows: Rows,
    encoded: Encoded,
    *,
    names: Sequence[str],
    max_length: int,
    read: Counts | None,
    seen_texts: NDArray[np.uint64] | None = None,
) -> RoleReport:
    """Count what stands in the rows of one role.

    Args:
        rows: The rows as they are used.
        encoded: Their token ids, with the lengths of whole texts.
        names: Label names.
        max_length: Most tokens of an input.
        read: What reading them did; None where they were carved out of train.
        seen_texts: Digests of the texts that training has seen, as `Rows` makes them; None for train itself.
    """
    first = rows.first_equal()
    again, alike = first != np.arange(len(rows)), rows.labels[first] == rows.labels
    seen = None if seen_texts is None else Found.of(rows.numbers[np.isin(rows.digests, seen_texts)])
    lengths = encoded.lengths if encoded.whole_lengths is None else encoded.whole_lengths
    quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf").tolist()
    return RoleReport(
        rows=len(rows),
        labels={name: int((rows.labels == i).sum()) for i, name in enumerate(names)},
        read=read,
        same_label=Found.of(rows.numbers[again & alike]),
        other_label=Found.of(rows.numbers[again & ~alike]),
        seen=seen,
        max_length=max_length,
        lengths={
            **{
                f"{share:.0%}": int(length)
                for share, length in zip(QUANTILES, quantiles, strict=True)
            },
            "longest": int(lengths.max()),
        },
        tokens=int(encoded.offsets[-1]),
        truncated=encoded.truncated,
    )


def describe_seen(data: Data, encoded: Mapping[str, Encoded], *, max_length: int) -> DataReport:
    """Count what stands in train and validation.

    Args:
        data: Both, as training has them.
        encoded: Their token ids, by role.
        max_length: Most tokens of an input.
    """
    seen: dict[str, tuple[Rows, NDArray[np.uint64] | None]] = {
        "train": (data.train, None),
        "validation": (data.validation, data.train.digests),
    }
    return DataReport(
        {
            role: describe_role(
                rows,
                encoded[role],
                names=data.labels,
                max_length=max_length,
                read=data.counts.get(role),
                seen_texts=texts,
            )
            for role, (rows, texts) in seen.items()
        }
    )


def describe_judged(
    data: Data, judged: Judged, role: str, encoded: Encoded, *, max_length: int
) -> RoleReport:
    """Count what stands in the rows of a judged role.

    Args:
        data: The rows that training has seen.
        judged: The judged rows.
        role: One of `judged.rows`.
        encoded: Its token ids.
        max_length: Most tokens of an input.
    """
    return describe_role(
        judged.rows[role],
        encoded,
        names=data.labels,
        max_length=max_length,
        read=judged.counts.get(role),
        seen_texts=data.seen_texts,
    )


def _reading(read: Counts) -> dict[str, Any]:
    return {
        "read": read.read,
        "kept": read.kept,
        "cleaned": {rule: count for rule, count in read.cleaned.items() if count},
        "dropped": {kind: Found.of(numbers).as_dict() for kind, numbers in read.dropped.items()},
    }


def _table(roles: Mapping[str, RoleReport]) -> list[str]:
    """Lay roles out side by side."""
    found = list(roles.values())
    names = list(found[0].labels)
    lines = {"": list(roles), "rows": [f"{role.rows:,}" for role in found]}
    for name in names[:SHOWN_LABELS]:
        lines[f"  {name}"] = [f"{role.labels[name]:,}" for role in found]
    if len(names) > SHOWN_LABELS:
        counts = [[role.labels[name] for name in names[SHOWN_LABELS:]] for role in found]
        lines[f"  {len(names) - SHOWN_LABELS} more, each"] = [
            f"{min(own):,} to {max(own):,}" for own in counts
        ]
    for quantile in found[0].lengths:
        lines[f"tokens, {quantile}"] = [f"{role.lengths[quantile]:,}" for role in found]
    lines[f"cut at {found[0].max_length} tokens"] = [
        f"{role.truncated / role.rows:.1%}" for role in found
    ]
    lines["twice, same label"] = [f"{role.same_label.rows:,}" for role in found]
    lines["twice, other label"] = [f"{role.other_label.rows:,}" for role in found]
    lines["text seen in training"] = [
        "-" if role.seen is None else f"{role.seen.rows:,}" for role in found
    ]
    left, width = max(map(len, lines)), max(len(cell) for cells in lines.values() for cell in cells)
    return [
        f"{heading:<{left}}" + "".join(f"  {cell:>{width}}" for cell in cells)
        for heading, cells in lines.items()
    ]


def _notes(role: RoleReport) -> list[str]:
    """Say of one role what a table of counts cannot."""
    notes = []
    if role.read:
        notes += [
            f"{kind}, DROPPED: {Found.of(numbers)}" for kind, numbers in role.read.dropped.items()
        ]
        cleaned = [f"{count:,} {rule}" for rule, count in role.read.cleaned.items() if count]
        notes += (
            [f"rows read {role.read.read:,}, of which cleaned: {', '.join(cleaned)}"]
            if cleaned
            else []
        )
    if role.other_label.rows:
        notes.append(f"text stands earlier under another label: {role.other_label}")
    if role.seen and role.seen.rows:
        notes.append(f"text was seen in training: {role.seen}")
    return notes
