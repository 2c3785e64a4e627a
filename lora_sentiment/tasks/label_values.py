"""From the values of a label column to names, and to their indices."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.cleaning import fold_name, strip_blanks
from lora_sentiment.errors import DataError, show, show_names

INTEGER = re.compile(r"-?\d+")
WHOLE = re.compile(r"[-+]?\d{1,18}([.,]0*)?")
"""An integer, also as a table program writes it in a column with gaps: 1.0."""
DECIMAL = re.compile(r"[-+]?(\d+[.,]\d*|[.,]\d+)([eE][-+]?\d+)?")
UNKNOWN = -1
"""Index of a label that is missing or has no name."""
SHOWN_LABELS = 8
"""Labels that a message names where all of them would be too many."""


class Fault(NamedTuple):
    """Why a row cannot be used.

    Attributes:
        kind: The kind of fault, which quotes no data.
        message: What was found and what is allowed.
        column: The column, if the message does not name it.
    """

    kind: str
    message: str
    column: str | None = None


def rename(
    values: list[Any], own: tuple[str, ...], names: tuple[str, ...], where: str, *, is_ordered: bool
) -> list[Any]:
    """Turn integers of a data set with names of its own into our names.

    If none of its names is ours, and ours are in order, the integers stay and count positions in
    our names.
    """
    if set(own) <= set(names):
        return [own[v] if isinstance(v, int) and 0 <= v < len(own) else v for v in values]
    if set(own) & set(names) or len(own) != len(names) or not is_ordered:
        raise DataError(
            f"{where}: its labels are {', '.join(own)}, and not {', '.join(names)}; use rows with "
            "the labels of the training"
        )
    return values


def label_text(value: Any) -> str:
    """Return a label value as text, or an empty text for a value that is no label."""
    return strip_blanks(str(value)) if isinstance(value, (str, int)) else ""


def find_names(values: list[Any], where: str, *, num_files: int) -> tuple[str, ...]:
    """Return the sorted names of all label values.

    Decimal numbers are refused: they are scores, or integers that a table program wrote as 1.0. So
    are files with the integers 0, 1, .. beside files with as many words.
    """
    names = sorted({label_text(value) for value in values} - {""}, key=_label_order)
    decimals = [name for name in names if DECIMAL.fullmatch(name)]
    if decimals and all(DECIMAL.fullmatch(name) or INTEGER.fullmatch(name) for name in names):
        raise DataError(
            f"{where}: the labels are decimal numbers, such as {min(decimals)}; a class is an "
            "integer or a name: write integers, or state data.labels with every value in quotes if "
            "they are names"
        )
    if not names:
        raise DataError(
            f"{where}: the label column holds neither text nor integers; its first value is "
            f"{show(values[0])}"
        )
    if len(names) > max(100, len(values) // 2):
        raise DataError(
            f"{where}: the label column holds {len(names)} different values in {len(values)} rows; "
            "is it the right column?"
        )
    integers = [name for name in names if INTEGER.fullmatch(name)]
    words = [name for name in names if not INTEGER.fullmatch(name)]
    if len(words) < 2 or integers != [str(i) for i in range(len(words))]:
        return tuple(names)
    texts = filter(None, map(label_text, values))
    is_integer = [bool(INTEGER.fullmatch(text)) for text in texts]
    # Files of one kind follow one another, so the kind changes only between two files.
    if sum(first != second for first, second in pairwise(is_integer)) < num_files:
        raise DataError(
            f"{where}: some labels are the integers {list_names(integers)}, others the names "
            f"{list_names(words)}; which integer stands for which name is not known: write the names in "
            "every row",
            advice={
                "data.labels": ", or, if the integers are labels of their own, state all labels "
                "in {}"
            },
        )
    return tuple(names)


def list_names(names: Sequence[object]) -> str:
    """Return the first names, for a message."""
    return show_names([str(name) for name in names], most=SHOWN_LABELS)


def _list_positions(names: Sequence[str]) -> str:
    return list_names([f"{i}={name}" for i, name in enumerate(names)])


def _label_order(name: str) -> tuple[int, int, str]:
    # Python refuses to convert an integer of more than 4,300 digits, or of 640 if it is told to.
    if re.fullmatch(r"-?\d{1,640}", name):
        return (0, int(name), name)
    return (1, 0, name)


def index_labels(
    values: list[Any], names: tuple[str, ...], where: str, *, is_ordered: bool
) -> NDArray[np.int64]:
    """Return the index of each label value, or UNKNOWN: (num_rows,).

    Args:
        values: Label values of a role.
        names: Label names.
        where: The role, for messages.
        is_ordered: Whether the recipe or the Hub data set orders the names. Then integers may
            stand for them: 0 for the first name, 1 for the second.

    Raises:
        DataError: The values are integers for names that were only sorted, or integers that count
            from another number.
    """
    index = {strip_blanks(name): i for i, name in enumerate(names)}
    # Exact names come first: older versions kept blanks around them.
    index |= {name: i for i, name in enumerate(names)}
    index.pop("", None)
    texts = {label_text(value) for value in values} - {""}
    if not texts <= index.keys() and all(WHOLE.fullmatch(text) for text in texts):
        integers = sorted({int(re.split("[.,]", text)[0]) for text in texts})
        if not any(INTEGER.fullmatch(name) for name in index):
            if not is_ordered and not set(integers).isdisjoint(range(len(names))):
                raise DataError(
                    f"{where}: its labels are the integers {list_names(integers)}, but the names of the "
                    f"labels were only sorted, so {_list_positions(names)} would be a guess; write "
                    "the names in the file, or train with data.labels, which lists the names in "
                    "the order of the integers"
                )
            _refuse_other_start(integers, names, where, texts)
            index = {str(i): i for i in range(len(names))} | index
    found = np.full(len(values), UNKNOWN, dtype=np.int64)
    for position, value in enumerate(values):
        text = label_text(value)
        spelling = value if isinstance(value, str) else text
        found[position] = index.get(spelling, index.get(text, UNKNOWN))
    return found


def _refuse_other_start(
    integers: list[int], names: tuple[str, ...], where: str, texts: set[str]
) -> None:
    """Refuse integers that count names from another number than 0.

    Raises:
        DataError: Some integer is no position of a name, and all would be with 1 less, or with 1
            more.
    """
    last = len(names) - 1
    if integers[0] > 0 and integers[-1] == last + 1:
        advice = "subtract 1 from each label"
    # -1 is a hidden label too, unless all labels are there.
    elif integers[0] == -1 and integers[-1] < last < len(integers):
        advice = "add 1 to each label"
    elif integers == [-1, 1] and last == 1:
        advice = "write 0 for -1"
    else:
        return
    if any(DECIMAL.fullmatch(text) for text in texts):
        advice += " and write it without a decimal point"
    raise DataError(
        f"{where}: its labels are {list_names(integers)}, but here they count from 0 to {last} "
        f"({_list_positions(names)}); {advice}, or write the names in the file"
    )


def explain_label(value: Any, names: tuple[str, ...], column: str) -> Fault:
    """Return the fault of a label that is missing or unknown."""
    # In tables that know no other missing number it is a NaN.
    is_nan = isinstance(value, float) and value != value
    is_blank = isinstance(value, str) and not strip_blanks(value)
    if value is None or is_blank or is_nan:
        return Fault("label is missing", "label is missing", column)
    kind = "label is unknown"
    if not isinstance(value, (str, int)):
        kind = f"label is {type(value).__name__}"
    message = f"label {show(value)} is none of {list_names(names)}"
    if DECIMAL.fullmatch(label_text(value)) and WHOLE.fullmatch(label_text(value)):
        message += "; write integers without a decimal point"
    folded = fold_name(label_text(value))
    similar = [name for name in names if kind == "label is unknown" and fold_name(name) == folded]
    if similar:
        message += (
            f"; it differs from {show(similar[0])} only in case, blanks or the form of a character"
        )
    return Fault(kind, message, column)
