"""Read labelled rows: map labels, drop or refuse bad rows, carve out splits, sample."""

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_sentiment.cleaning import clean_text, fold_name, strip_blanks
from lora_sentiment.data.sources import (
    Columns,
    Source,
    check_files,
    find_source,
    is_on_hub,
    read_columns,
)
from lora_sentiment.data.texts import Texts, encode_text, hash_texts, store_texts
from lora_sentiment.errors import DataError, show, show_names
from lora_sentiment.recipe.data import DataConfig

INTEGER = re.compile(r"-?\d+")
WHOLE = re.compile(r"[-+]?\d{1,18}([.,]0*)?")
"""An integer, also as a table program writes it in a column with gaps: 1.0."""
DECIMAL = re.compile(r"[-+]?(\d+[.,]\d*|[.,]\d+)([eE][-+]?\d+)?")
UNKNOWN = -1
"""Index of a label that is missing or has no name."""
SHOWN_FAULTS = 5
"""Kinds of faults that a message names."""
SHOWN_LABELS = 8
"""Labels that a message names where all of them would be too many."""

Fault = tuple[str, str]
"""A kind of fault, which quotes no data, and a message."""


@dataclass(frozen=True)
class Rows:
    """Labelled texts of one split.

    Attributes:
        texts: The cleaned text of each row.
        labels: Label index of each row, shape (num_rows,).
        numbers: Position of each row in its source, counted from 1, shape (num_rows,).
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: NDArray[np.int64]) -> "Rows":
        """Return the rows at these positions, in this order."""
        if isinstance(self.texts, Texts):
            texts: Sequence[str] = self.texts.take(index)
        else:
            texts = [self.texts[i] for i in index]
        return Rows(texts, self.labels[index], self.numbers[index])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of labels and texts in order."""
        return hash_texts(hashlib.sha256(self.labels.tobytes()), self.texts)

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """The `digest_text` of each text, shape (num_rows,)."""
        return np.fromiter(map(digest_text, self.texts), dtype=np.uint64, count=len(self))

    def find_first_equal(self) -> NDArray[np.int64]:
        """Return for each row the position of the first row with the same text: (num_rows,)."""
        _, first, group = np.unique(self.digests, return_index=True, return_inverse=True)
        return np.asarray(first[group], dtype=np.int64)


def digest_text(text: str) -> int:
    """Return 64 bits of BLAKE2b. Among a million texts the chance of a collision is 3e-8."""
    return int.from_bytes(hashlib.blake2b(encode_text(text), digest_size=8).digest())


@dataclass
class Counts:
    """Counts of one split while it was read, without any text.

    Attributes:
        read: Rows in the source.
        kept: Rows that are used.
        cleaned: Number of texts that each cleaning rule changed.
        dropped: Kind of fault to the numbers of the rows dropped for it, counted from 1.
        unlabelled: Rows of a split whose labels are all -1, as in the test splits of GLUE. Such a
            split is not evaluated.
        own_names: Label names that the source declares, as ClassLabel features of the Hub do.
    """

    read: int = 0
    kept: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    unlabelled: int = 0
    own_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Data:
    """The rows that training uses. `load_judged` reads the others after training.

    Attributes:
        config: The recipe's `data` section. Its `labels` are the names in the order of the
            recipe or of the Hub data set. None means that the names were only sorted.
        labels: Label names. The index of a name is its label.
        train: Rows to train on.
        validation: Rows to choose the best checkpoint on.
        judged: Roles of the source that are evaluated at the end.
        carved_test: Rows carved out of train for test, if the recipe says so and the source has no
            role to evaluate.
        counts: Counts of each split that was read.
    """

    config: DataConfig
    labels: tuple[str, ...]
    train: Rows
    validation: Rows
    judged: tuple[str, ...]
    carved_test: Rows | None
    counts: dict[str, Counts]

    @cached_property
    def seen_texts(self) -> NDArray[np.uint64]:
        """Digests of the texts of train and validation."""
        return np.concatenate([self.train.digests, self.validation.digests])


def load_data(config: DataConfig, *, labels: tuple[str, ...] | None = None) -> Data:
    """Read train and validation, or carve validation out of train.

    A carved split is stratified, and equal texts stay on one side.

    Args:
        config: The recipe's `data` section.
        labels: Label names as an earlier training used them. None takes those of the recipe, of the
            source, or of the training rows, in this order.

    Raises:
        DataError: A source, column, label or row cannot be used.
    """
    source = find_source(config)
    check_files(config, source)
    train, names, counts = _load_split(
        config,
        source,
        "train",
        labels=labels or _declared_names(config),
        max_rows=config.max_train_rows,
        for_training=True,
    )
    if counts.own_names and config.labels is None:
        config = config.model_copy(update={"labels": names})
    all_counts = {"train": counts}
    if len(np.unique(train.labels)) < 2:
        label = show(names[train.labels[0]])
        raise DataError(
            f"{source.where('train')}: every row has the label {label}; a classifier needs two "
            "labels"
        )
    carved_test = None
    is_test_carved = bool(config.test_fraction) and not source.judged
    carved_roles = ["validation"] if "validation" not in source.roles else []
    if is_test_carved:
        carved_roles.append("test")
    _refuse_rare_labels(train, names, config, source, carved_roles)
    if is_test_carved:
        train, carved_test = carve(
            train,
            names,
            fraction=config.test_fraction,
            seed=config.split_seed + 1,
            key="data.test_fraction",
        )
        carved_test = sample(carved_test, num_rows=config.max_test_rows, seed=config.split_seed)
    if "validation" in source.roles:
        validation, _, all_counts["validation"] = _load_split(
            config, source, "validation", labels=names
        )
    else:
        train, validation = carve(
            train,
            names,
            fraction=config.validation_fraction,
            seed=config.split_seed,
            key="data.validation_fraction",
        )
    return Data(config, names, train, validation, source.judged, carved_test, all_counts)


def load_judged(
    config: DataConfig, *, role: str, labels: tuple[str, ...]
) -> tuple[Rows | None, Counts]:
    """Read the rows of a role that is evaluated at the end, or None if all its labels are hidden.

    Args:
        config: The recipe's `data` section.
        role: One of `Data.judged`.
        labels: Label names as training used them.

    Raises:
        DataError: As `load_data`.
    """
    source = find_source(config)
    check_files(config, source)
    rows, _, counts = _load_split(
        config, source, role, labels=labels, max_rows=config.max_test_rows, may_be_hidden=True
    )
    return (None if counts.unlabelled else rows), counts


@dataclass(frozen=True)
class Judged:
    """The rows that are evaluated at the end, by role.

    Attributes:
        rows: Rows with labels. Those of test may be carved out of train.
        counts: Counts of the roles that were read.
        unlabelled: Number of rows of each role whose labels are hidden.
        faults: The error of each role whose rows cannot be used.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    unlabelled: dict[str, int] = field(default_factory=dict)
    faults: dict[str, DataError] = field(default_factory=dict)


def load_all_judged(config: DataConfig, data: Data) -> Judged:
    """Read every role that is evaluated at the end. An error concerns only its own role."""
    judged = Judged()
    if data.carved_test:
        judged.rows["test"] = data.carved_test
    for role in data.judged:
        try:
            rows, counts = load_judged(config, role=role, labels=data.labels)
        except DataError as error:
            judged.faults[role] = error
            continue
        if rows is None:
            judged.unlabelled[role] = counts.read
        else:
            judged.rows[role] = rows
            judged.counts[role] = counts
    return judged


def load_rows(config: DataConfig, *, split: str, labels: tuple[str, ...]) -> tuple[Rows, Counts]:
    """Read all rows of one split of a Hub data set by its own name, or of files.

    Args:
        config: The recipe's `data` section; its source is text.
        split: Name of a split of the Hub data set, or a role of the bundled reviews. Not used for
            other files, which have one role.
        labels: Label names as training used them.

    Raises:
        DataError: As `load_data`, and if the data set has no such split.
    """
    splits = {split: split} if is_on_hub(config.source) else None
    source = find_source(config.model_copy(update={"splits": splits}))
    role = split if len(source.roles) > 1 else source.roles[0]
    if role not in source.roles:
        raise DataError(
            f"split: found {show(split)}; {config.source!r} has {', '.join(source.roles)}"
        )
    check_files(config, source)
    rows, _, counts = _load_split(config, source, role, labels=labels)
    return rows, counts


def load_raw_texts(config: DataConfig, rows: Rows, *, role: str) -> list[str]:
    """Return the texts of rows as they stand in their source, before cleaning.

    Args:
        config: The recipe's `data` section.
        rows: Rows of one role.
        role: The role in the source. That of rows carved out of train is train.
    """
    columns, _ = read_columns(config, find_source(config), role)
    wanted = set(rows.numbers.tolist())
    raw = {}
    number = 0
    for texts, _ in columns:
        for text in texts:
            number += 1
            if number in wanted:
                raw[number] = text
    return [raw[number] for number in rows.numbers.tolist()]


def carve(
    rows: Rows, names: Sequence[str], *, fraction: float, seed: int, key: str
) -> tuple[Rows, Rows]:
    """Split rows in two, stratified by label. Equal texts stay on one side.

    Args:
        rows: The rows to split.
        names: Label names, for messages.
        fraction: Share of each label's rows that goes to the second part.
        seed: Decides which rows.
        key: Recipe key of the fraction, for messages.

    Returns:
        (the rest, the carved part), each in the order of `rows`.

    Raises:
        DataError: One part would hold no row of some label.
    """
    generator = np.random.default_rng(seed)
    first = rows.find_first_equal()
    num_equal = np.bincount(first, minlength=len(rows))
    distinct = np.flatnonzero(num_equal)
    # A text that occurs under two labels counts for the label of its first row.
    distinct_labels = rows.labels[distinct]
    is_chosen = np.zeros(len(rows), dtype=bool)
    for label in np.unique(distinct_labels):
        texts = distinct[distinct_labels == label]
        num_wanted = max(1, round(int(num_equal[texts].sum()) * fraction))
        texts = texts[generator.permutation(len(texts))]
        # Take the first texts in this order that together have as many rows as wanted.
        num_texts = np.searchsorted(num_equal[texts].cumsum(), num_wanted) + 1
        is_chosen[texts[:num_texts]] = True
    is_carved = is_chosen[first]
    emptied = np.setdiff1d(rows.labels, rows.labels[~is_carved])
    if len(emptied):
        fault = _explain_rare_labels(rows, names, emptied, fraction)
        raise DataError(f"{fault}\nadd rows with these labels", advice={key: ", or lower {}"})
    return rows.take(np.flatnonzero(~is_carved)), rows.take(np.flatnonzero(is_carved))


def _refuse_rare_labels(
    rows: Rows, names: Sequence[str], config: DataConfig, source: Source, roles: list[str]
) -> None:
    """Refuse labels with too few distinct texts for train and each role that is carved out of it.

    Raises:
        DataError: There are such labels. The message counts all of them.
    """
    if not roles:
        return
    first = rows.find_first_equal()
    pairs = np.unique(np.stack([rows.labels, first]), axis=1)
    present, num_texts = np.unique(pairs[0], return_counts=True)
    # A text that stands earlier under another label is carved with that label, or stays.
    shared = rows.labels[rows.labels[first] != rows.labels]
    rare = np.setdiff1d(present[num_texts <= len(roles)], shared)
    if not len(rare):
        return
    fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
    fraction = sum(fractions[role] for role in roles)
    fault = _explain_rare_labels(rows, names, rare, fraction)
    key = "data.splits" if source.hub else "data.source"
    named = ", ".join(f"{role}: .." for role in ("train", *roles))
    advice = {}
    if config.max_train_rows:
        advice["data.max_train_rows"] = ", or set {} higher"
    advice[key] = (
        f", or name rows for {' and '.join(roles)}, which need not hold every label: "
        f"{{}}={{{named}}}"
    )
    others = np.setdiff1d(present, rare)
    # Integers that stand for names would stand for other names if one were left out.
    if config.labels is None and len(others) >= 2:
        kept = json.dumps([names[label] for label in others], ensure_ascii=False)
        advice["data.labels"] = f", or leave these labels out: {shlex.quote(f'{{}}={kept}')}"
        advice["data.on_bad_row"] = " {}=drop"
    raise DataError(f"{fault}\nadd rows with these labels", advice=advice)


def _explain_rare_labels(
    rows: Rows, names: Sequence[str], labels: NDArray[np.int64], fraction: float
) -> str:
    """Count the labels of whose rows this fraction cannot be carved out."""
    counted = []
    for label in labels.tolist():
        num_rows = int((rows.labels == label).sum())
        counted.append(f"{show(names[label])} ({num_rows:,})")
    fault = f"too few distinct texts to carve {100 * fraction:g}% out of"
    if len(labels) == 1:
        return f"label {show(names[labels[0]])} has {fault} its rows ({num_rows:,})"
    return f"{len(labels)} labels have {fault} their rows: {', '.join(counted)}"


def sample(rows: Rows, *, num_rows: int | None, seed: int) -> Rows:
    """Return a stratified sample of rows in order. Each label keeps its share to within one row.

    All rows are returned if there are no more than `num_rows`, or if it is None.
    """
    if num_rows is None or num_rows >= len(rows):
        return rows
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(rows))
    # Sorted by label, every k-th row is taken, which keeps the shares without rounding.
    by_label = order[np.argsort(rows.labels[order], kind="stable")]
    taken = by_label[(np.arange(num_rows) * len(rows)) // num_rows]
    return rows.take(np.sort(taken))


def _load_split(
    config: DataConfig,
    source: Source,
    role: str,
    *,
    labels: tuple[str, ...] | None,
    max_rows: int | None = None,
    may_be_hidden: bool = False,
    for_training: bool = False,
) -> tuple[Rows, tuple[str, ...], Counts]:
    """Read the rows of a role: clean texts, map labels, drop or refuse bad rows, sample.

    Args:
        config: The recipe's `data` section.
        source: Where the rows are.
        role: A role of the source.
        labels: Label names in order. None takes those of the source.
        max_rows: Size of the sample. None takes all rows.
        may_be_hidden: Whether all labels may be -1. Then no row is returned, and
            `Counts.unlabelled` counts them.
        for_training: Whether dropping bad rows must leave a row of each label.
    """
    where = source.where(role)
    columns, own_names = read_columns(config, source, role)
    counts = Counts(own_names=own_names)
    values: list[Any] = []
    faults: dict[int, Fault] = {}
    texts = store_texts(_clean_texts(columns, values, faults, counts, clean=config.clean))
    counts.read = len(values)
    if not values:
        raise DataError(f"{where}: has no rows; name another file or split")
    if may_be_hidden and labels and "-1" not in labels and all(v in (-1, "-1") for v in values):
        counts.unlabelled = len(values)
        empty = np.empty(0, dtype=np.int64)
        return Rows([], empty, empty), labels, counts
    if own_names and labels and own_names != labels:
        is_ordered = config.labels is not None
        values = _rename(values, own_names, labels, where, is_ordered=is_ordered)
    num_files = len(source.files.get(role, ()))
    names = labels or own_names or _find_names(values, where, num_files=num_files)
    is_ordered = config.labels is not None or own_names is not None
    index = _index_labels(values, names, where, is_ordered=is_ordered)
    for position in np.flatnonzero(index == UNKNOWN).tolist():
        faults.setdefault(position, _explain_label(values[position], names))
    for position, (kind, _) in sorted(faults.items()):
        counts.dropped.setdefault(kind, []).append(position + 1)
    is_good = np.ones(len(values), dtype=bool)
    is_good[list(faults)] = False
    lost = np.setdiff1d(np.arange(len(names) if for_training else 0), index[is_good])
    if faults and config.on_bad_row == "error":
        may_drop = len(faults) < len(values) / 2 and not len(lost)
        raise _bad_rows(where, faults, values, names, may_drop=may_drop)
    if len(faults) == len(values):
        raise DataError(
            f"{where}: no usable row among {len(values)}: {', '.join(counts.dropped)}",
            advice={"data.on_bad_row": "; {}=error says which rows and why"},
        )
    if faults and len(lost):
        raise DataError(
            f"{where}: no row is left for {_list([names[i] for i in lost])} after dropping "
            f"{len(faults):,} rows: {', '.join(counts.dropped)}; correct these rows",
            advice={"data.on_bad_row": "; {}=error says which rows and why"},
        )
    rows = Rows(texts, index, np.arange(1, len(values) + 1))
    if faults:
        rows = rows.take(np.flatnonzero(is_good))
    sampled = sample(rows, num_rows=max_rows, seed=config.split_seed)
    counts.kept = len(sampled)
    unsampled = np.setdiff1d(rows.labels, sampled.labels)
    if for_training and len(unsampled):
        raise DataError(
            f"{where}: a sample of {max_rows:,} rows holds no row of "
            f"{_list([names[i] for i in unsampled])}",
            advice={"data.max_train_rows": "; set {} higher, or to null"},
        )
    return sampled, names, counts


def _clean_texts(
    columns: Columns, values: list[Any], faults: dict[int, Fault], counts: Counts, *, clean: bool
) -> Iterator[str]:
    """Yield cleaned texts, empty where a text has a fault.

    Args:
        columns: Texts and label values of some rows at a time.
        values: Every label value is added. Equal strings become one object.
        faults: Every fault of a text is added, by position.
        counts: Cleaned texts are counted.
        clean: Whether to clean.
    """
    for some_texts, some_values in columns:
        for position, text in enumerate(some_texts, start=len(values)):
            if isinstance(text, str) and clean:
                text = clean_text(text, counts.cleaned)
            fault = _explain_text(text)
            if fault:
                faults[position] = fault
                text = ""
            yield text
        values += [intern(value) if isinstance(value, str) else value for value in some_values]


def _rename(
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


def _label_text(value: Any) -> str:
    """Return a label value as text, or an empty text for a value that is no label."""
    return strip_blanks(str(value)) if isinstance(value, (str, int)) else ""


def _find_names(values: list[Any], where: str, *, num_files: int) -> tuple[str, ...]:
    """Return the sorted names of all label values.

    Decimal numbers are refused: they are scores, or integers that a table program wrote as 1.0. So
    are files with the integers 0, 1, .. beside files with as many words.
    """
    names = sorted({_label_text(value) for value in values} - {""}, key=_label_order)
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
    texts = filter(None, map(_label_text, values))
    is_integer = [bool(INTEGER.fullmatch(text)) for text in texts]
    # Files of one kind follow one another, so the kind changes only between two files.
    if sum(first != second for first, second in pairwise(is_integer)) < num_files:
        raise DataError(
            f"{where}: some labels are the integers {_list(integers)}, others the names "
            f"{_list(words)}; which integer stands for which name is not known: write the names in "
            "every row",
            advice={
                "data.labels": ", or, if the integers are labels of their own, state all labels "
                "in {}"
            },
        )
    return tuple(names)


def _declared_names(config: DataConfig) -> tuple[str, ...] | None:
    """Return the label names of the recipe without blanks around them, or None."""
    if config.labels is None:
        return None
    names = tuple(strip_blanks(name) for name in config.labels)
    if len(set(names)) < len(names) or "" in names:
        raise DataError(
            f"found {list(config.labels)}; blanks around a name do not count: each name must "
            "differ from the others in more, and hold another character",
            key="data.labels",
        )
    return names


def _list(names: Sequence[object]) -> str:
    return show_names([str(name) for name in names], most=SHOWN_LABELS)


def _list_positions(names: Sequence[str]) -> str:
    return _list([f"{i}={name}" for i, name in enumerate(names)])


def _label_order(name: str) -> tuple[int, int, str]:
    # Python refuses to convert an integer of more than 4,300 digits, or of 640 if it is told to.
    if re.fullmatch(r"-?\d{1,640}", name):
        return (0, int(name), name)
    return (1, 0, name)


def _index_labels(
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
    texts = {_label_text(value) for value in values} - {""}
    if not texts <= index.keys() and all(WHOLE.fullmatch(text) for text in texts):
        integers = sorted({int(re.split("[.,]", text)[0]) for text in texts})
        if not any(INTEGER.fullmatch(name) for name in index):
            if not is_ordered and not set(integers).isdisjoint(range(len(names))):
                raise DataError(
                    f"{where}: its labels are the integers {_list(integers)}, but the names of the "
                    f"labels were only sorted, so {_list_positions(names)} would be a guess; write "
                    "the names in the file, or train with data.labels, which lists the names in "
                    "the order of the integers"
                )
            _refuse_other_start(integers, names, where, texts)
            index = {str(i): i for i in range(len(names))} | index
    found = np.full(len(values), UNKNOWN, dtype=np.int64)
    for position, value in enumerate(values):
        text = _label_text(value)
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
        f"{where}: its labels are {_list(integers)}, but here they count from 0 to {last} "
        f"({_list_positions(names)}); {advice}, or write the names in the file"
    )


def _explain_text(text: Any) -> Fault | None:
    """Return the fault of a text, or None."""
    if text is None:
        return "text is missing", "text is missing"
    if not isinstance(text, str):
        return "text is no string", f"text is {type(text).__name__}, not a string"
    if not text.strip():
        return "text is empty", "text is empty"
    return None


def _explain_label(value: Any, names: tuple[str, ...]) -> Fault:
    """Return the fault of a label that is missing or unknown."""
    # In tables that know no other missing number it is a NaN.
    is_nan = isinstance(value, float) and value != value
    is_blank = isinstance(value, str) and not strip_blanks(value)
    if value is None or is_blank or is_nan:
        return "label is missing", "label is missing"
    kind = "label is unknown"
    if not isinstance(value, (str, int)):
        kind = f"label is {type(value).__name__}"
    message = f"label {show(value)} is none of {_list(names)}"
    if DECIMAL.fullmatch(_label_text(value)) and WHOLE.fullmatch(_label_text(value)):
        message += "; write integers without a decimal point"
    return kind, message


def _bad_rows(
    where: str,
    faults: dict[int, Fault],
    values: list[Any],
    names: tuple[str, ...],
    *,
    may_drop: bool,
) -> DataError:
    numbers: dict[str, list[int]] = {}
    for position, (_, message) in sorted(faults.items()):
        numbers.setdefault(message, []).append(position + 1)
    lines = []
    for message, rows in list(numbers.items())[:SHOWN_FAULTS]:
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        kind, _ = faults[rows[0] - 1]
        if kind == "label is unknown":
            folded = fold_name(_label_text(values[rows[0] - 1]))
            similar = [name for name in names if fold_name(name) == folded]
            if similar:
                message += (
                    f"; it differs from {show(similar[0])} only in case, blanks or the form of a "
                    "character"
                )
        lines.append(f"{where}: row {rows[0]}: {message}{more}")
    if len(numbers) > SHOWN_FAULTS:
        lines.append(f"... and {len(numbers) - SHOWN_FAULTS} more kinds")
    lines.append("correct them")
    return DataError(
        "\n".join(lines),
        rows=[rows[0] for rows in numbers.values()],
        advice={"data.on_bad_row": ", or set {}=drop"} if may_drop else {},
    )
